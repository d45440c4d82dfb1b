// The number formats and the scale-factor layout, once, for host and device. No torch, no CUDA headers.
//
//   e2m1  4 bits: sign, 2 exponent bits, 1 mantissa bit   0 .5 1 1.5 2 3 4 6
//   e4m3  8 bits: sign, 4, 3; bias 7; max 448 = 0x7e; 0x7f / 0xff are NaN; no infinity
//   e8m0  8 bits: 2^(byte - 127); 0xff is NaN
//   value = e2m1(code) * e4m3(sf) * alpha; the product of the first two has at most 6 significant bits,
//   so it is exact in bf16 and fp16.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define NVFP4_HD __host__ __device__ __forceinline__
#else
#define NVFP4_HD inline
#endif

namespace nvfp4 {

constexpr int kBlock = 16;  // values that share one e4m3 scale
constexpr float kE2m1Max = 6.0f;
constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3Min = 0x1p-9f;  // smallest positive subnormal, byte 0x01
constexpr uint8_t kE4m3NaN = 0x7f;
constexpr float kTensorMax = 2688.0f;  // 6 * 448: what a code and a scale reach together

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

NVFP4_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
NVFP4_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
NVFP4_HD bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }
NVFP4_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
NVFP4_HD float abs_of(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
NVFP4_HD float pow2(int p) { return float_of(static_cast<uint32_t>(p + 127) << 23); }  // -126 <= p <= 127

// ---- e2m1 -----------------------------------------------------------------------------------------

NVFP4_HD float e2m1_decode(uint32_t code) {  // low 4 bits
  const uint32_t m = code & 7;
  // normals (m >= 2): exponent (m >> 1) - 1, mantissa bit m & 1; 0 and 0.5 are m * 0.5
  const uint32_t normal = (m << 22) + (126u << 23);
  const uint32_t small = m ? 0x3f000000u : 0u;
  return float_of((code & 8) << 28 | (m >= 2 ? normal : small));
}

// Round |q| to nearest, ties to the even code, saturating at 6; NaN gives 0. The sign bit is that of `x`,
// whose quotient q is, so it survives 0/0; a NaN x has none, since the sign of a NaN differs between chips.
NVFP4_HD uint32_t e2m1_encode(float x, float q) {
  const float a = abs_of(q);
  const uint32_t m =
      (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return m | (is_nan(x) ? 0 : bits_of(x) >> 28 & 8);
}
NVFP4_HD uint32_t e2m1_encode(float x) { return e2m1_encode(x, x); }

// ---- e4m3 -----------------------------------------------------------------------------------------

NVFP4_HD float e4m3_decode_portable(uint32_t byte) {
  const uint32_t sign = (byte & 0x80) << 24, m = byte & 0x7f;
  if (m == 0x7f) return float_of(sign | 0x7fc00000u);
  if (m < 8) return float_of(sign | bits_of(static_cast<float>(m) * kE4m3Min));
  return float_of(sign | ((m << 20) + (120u << 23)));
}
NVFP4_HD float e4m3_decode(uint32_t byte) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  float x;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(byte)));
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(x) : "r"(halves));
  return x;
#else
  return e4m3_decode_portable(byte);
#endif
}

// Round to nearest even; magnitudes above 448 saturate, NaN gives 0x7f.
NVFP4_HD uint32_t e4m3_encode_portable(float x) {
  const uint32_t sign = bits_of(x) >> 24 & 0x80, u = bits_of(x) & 0x7fffffffu;
  if (u > 0x7f800000u) return kE4m3NaN;
  if (u >= 0x43e00000u) return sign | 0x7e;  // >= 448
  // subnormals: adding 2^14 puts the unit 2^-9 on float's last bit, and the addition rounds to even
  if (u < 0x3c800000u) return sign | (bits_of(float_of(u) + 0x1p14f) - bits_of(0x1p14f));
  return sign | ((u - (120u << 23) + 0x7ffffu + (u >> 20 & 1)) >> 20);
}
NVFP4_HD uint32_t e4m3_encode(float x) {
#if __CUDA_ARCH__ >= 890
  uint16_t byte;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(byte) : "f"(0.0f), "f"(x));
  return byte;
#else
  return e4m3_encode_portable(x);
#endif
}

// ---- e8m0 -----------------------------------------------------------------------------------------

NVFP4_HD float e8m0_decode(uint32_t byte) {
  if (byte == 255) return float_of(0x7fc00000u);
  return float_of(byte ? byte << 23 : 0x00400000u);  // byte 0 is 2^-127, a float32 subnormal
}

// The nearest power of two as torch casts: 1.5 * 2^p goes up (its implied leading bit is odd). Infinity and
// NaN give 255, the sign is dropped.
NVFP4_HD uint32_t e8m0_encode(float x) {
  const uint32_t u = bits_of(x) & 0x7fffffffu, e = u >> 23, f = u & 0x7fffffu;
  return e == 255 ? 255 : e + (f > 0x400000u || (f == 0x400000u && e > 0));
}

// ---- bf16, fp16 -----------------------------------------------------------------------------------

NVFP4_HD float to_float(float x) { return x; }
NVFP4_HD float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
NVFP4_HD float to_float(f16 x) {  // no branches: loops over it vectorise
  const int32_t m = x.bits & 0x7fff;
  const uint32_t small = bits_of(static_cast<float>(m) * 0x1p-24f);
  const uint32_t normal = (m << 13) + ((m >= 0x7c00 ? 224u : 112u) << 23);  // infinity and NaN: exponent 255
  return float_of((x.bits & 0x8000u) << 16 | (m < 0x400 ? small : normal));
}

NVFP4_HD bf16 to_bf16(float x) {  // nearest even
  const uint32_t u = bits_of(x), rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(is_nan(x) ? u >> 16 | 0x40 : rounded)};
}
NVFP4_HD f16 to_f16(float x) {  // nearest even, overflow to infinity
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, u = bits_of(x) & 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 rounds to infinity
  if (u < 0x38800000u)                                                   // below 2^-14: unit 2^-24
    return {static_cast<uint16_t>(sign | (bits_of(float_of(u) + 0.5f) - bits_of(0.5f)))};
  return {static_cast<uint16_t>(sign | (u - (112u << 23) + 0xfffu + (u >> 13 & 1)) >> 13)};
}

// ---- scale-factor layout --------------------------------------------------------------------------
//   linear       [rows, cols] row-major, cols = K / 16
//   interleaved  atoms of 128 rows x 4 columns = 512 bytes, atoms row-major:
//       byte(r, c) = ((r / 128) * ceil(cols / 4) + c / 4) * 512 + (r % 32) * 16 + (r / 32 % 4) * 4 + c % 4
//   size is rows * cols; cosize counts the padding too. Buffers are allocated and walked over cosize.
struct SfLayout {
  static constexpr int kAtomRows = 128, kAtomCols = 4, kAtom = kAtomRows * kAtomCols;
  int64_t rows, cols;

  NVFP4_HD int64_t atom_rows() const { return (rows + kAtomRows - 1) / kAtomRows; }
  NVFP4_HD int64_t atom_cols() const { return (cols + kAtomCols - 1) / kAtomCols; }
  NVFP4_HD int64_t size() const { return rows * cols; }
  NVFP4_HD int64_t cosize() const { return atom_rows() * atom_cols() * kAtom; }
  NVFP4_HD int64_t offset(int64_t r, int64_t c) const {
    return (r / 128 * atom_cols() + c / 4) * kAtom + r % 32 * 16 + r / 32 % 4 * 4 + c % 4;
  }
  NVFP4_HD void coord(int64_t byte, int64_t& r, int64_t& c) const {  // may name a padding cell
    const int64_t atom = byte / kAtom, in = byte % kAtom;
    r = atom / atom_cols() * 128 + in % 16 / 4 * 32 + in / 16;
    c = atom % atom_cols() * 4 + in % 4;
  }
};

}  // namespace nvfp4
