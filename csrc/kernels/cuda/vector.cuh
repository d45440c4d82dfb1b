// Blocks of 16 values in registers: loading them, their maximum, their e2m1 codes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "launch.cuh"

namespace nvfp4::cuda {

constexpr uint32_t kInfinity = 0x7f800000u;  // as bits; NaNs lie above

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 64-bit division takes about 100 instructions, 32-bit about 20.
__device__ inline int64_t divide(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Within one unit in the last place.
__device__ inline float fast_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// ---- a block --------------------------------------------------------------------------------------

template <class T>
struct Block {  // 16 values as they lie in memory
  static constexpr int kWords = kBlock * sizeof(T) / 4;
  uint32_t word[kWords];
};

__device__ inline float value(const Block<float>& b, int i) { return float_of(b.word[i]); }
__device__ inline float value(const Block<bf16>& b, int i) {
  return float_of(i % 2 ? b.word[i / 2] & 0xffff0000u : b.word[i / 2] << 16);
}
__device__ inline float value(const Block<f16>& b, int i) {
  const __half2 pair = reinterpret_cast<const __half2&>(b.word[i / 2]);
  return i % 2 ? __high2float(pair) : __low2float(pair);
}

// kValues from p into words; where they do not lie at a multiple of 16 bytes (a view's may not), one by one.
template <int kValues, class T>
__device__ void load(const T* p, bool aligned, uint32_t* word) {
  constexpr int kBytes = kValues * sizeof(T);
  __builtin_assume(__isGlobal(p));
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[i];
      word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) {
    if constexpr (sizeof(T) == 4) word[i] = bits_of(p[i]);
    if constexpr (sizeof(T) == 2) word[i] = p[2 * i].bits | static_cast<uint32_t>(p[2 * i + 1].bits) << 16;
  }
}

template <class T>
__device__ Block<T> load_block(const T* p, bool aligned) {
  Block<T> b;
  load<kBlock>(p, aligned, b.word);
  return b;
}

// Moves the words down by kBits, the lowest bits of `top` in at their upper end. The rare paths loop with it
// over values that stay in registers: unrolled, 16 divisions would be 11 KB of code.
template <int kBits, int kWords>
__device__ void shift(uint32_t (&word)[kWords], uint32_t top) {
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    word[i] = __funnelshift_rc(word[i], i + 1 < kWords ? word[i + 1] : top, kBits);
}

// Of each half the larger magnitude, under any sign, or a NaN.
template <class Pair>
__device__ Pair larger(Pair a, Pair b) {
#if __CUDA_ARCH__ >= 860
  uint32_t& x = reinterpret_cast<uint32_t&>(a);
  const uint32_t y = reinterpret_cast<const uint32_t&>(b);
  if constexpr (std::is_same_v<Pair, __half2>)
    asm("max.NaN.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  else
    asm("max.NaN.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
  return a;
#else
  return __hmax2_nan(__habs2(a), __habs2(b));
#endif
}

// Of all words.
template <class Pair, int kWords>
__device__ Pair larger_of(const uint32_t (&word)[kWords]) {
  Pair top = larger(reinterpret_cast<const Pair&>(word[0]), reinterpret_cast<const Pair&>(word[1]));
#pragma unroll
  for (int i = 2; i < kWords; ++i) top = larger(top, reinterpret_cast<const Pair&>(word[i]));
  return top;
}

// The largest magnitude as float bits; a NaN, if there is one.
template <class T, int kWords>
__device__ uint32_t largest(const uint32_t (&word)[kWords]) {
  if constexpr (sizeof(T) == 4) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) top = max(top, word[i] & 0x7fffffffu);
    return top;
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
    const Pair top = larger_of<Pair>(word);
    Block<T> both;
    reinterpret_cast<Pair&>(both.word[0]) = top;
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(fabsf(value(both, 0))), "f"(fabsf(value(both, 1))));
    return bits_of(most);
  }
}
template <class T>
__device__ uint32_t largest(const Block<T>& b) {
  return largest<T>(b.word);
}

// The same over finite values; `top` is largest(b).
template <class T>
__device__ uint32_t largest_finite(const Block<T>& b, uint32_t top) {
  if (top < kInfinity) return top;
  top = 0;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t u = bits_of(value(b, i)) & 0x7fffffffu;
    if (u < kInfinity) top = max(top, u);
  }
  return top;
}

// ---- e2m1 codes -----------------------------------------------------------------------------------
// For a quotient a >= 0 the code is min(2 a, a + 2, a / 2 + 4), 7 at most, rounded to the nearest integer,
// ties to even: three FMAs that add 1.5 * 2^23 (in half precision 1.5 * 2^10) round just so and leave the
// integer in the low bits. They start from a / 8 saturated at 1, which costs nothing; for it to end at 7 the
// third line is h a + 5 with the largest float h below 0.3. That is 6.5 at a = 5 but for h's error, which is
// smaller than the tie is wide and than what the next a adds; more than the other two below 4, and less
// than 7.5 at 8.

// The sign bits of values 8 h .. 8 h + 7, each at the top of its nibble.
template <class T>
__device__ uint32_t signs(const Block<T>& b, int h) {
  uint32_t even, odd;  // the bytes that hold them
  if constexpr (sizeof(T) == 4) {
    const uint32_t* w = b.word + 8 * h;
    even = __byte_perm(__byte_perm(w[0], w[2], 0x73), __byte_perm(w[4], w[6], 0x73), 0x5410);
    odd = __byte_perm(__byte_perm(w[1], w[3], 0x73), __byte_perm(w[5], w[7], 0x73), 0x5410);
  } else {
    const uint32_t* w = b.word + 4 * h;
    const uint32_t low = __byte_perm(w[0], w[1], 0x7531), high = __byte_perm(w[2], w[3], 0x7531);
    even = __byte_perm(low, high, 0x6420);
    odd = __byte_perm(low, high, 0x7531);
  }
  return (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
}

// Codes of values 8 h .. 8 h + 7. With r = 1 / step rounded correctly, q = x r and q + r (x - q step) is the
// correctly rounded quotient away from under- and overflow: what nvcc emits for a division, its reciprocal
// shared by the block.
template <class T>
__device__ uint32_t codes_by_quotient(const Block<T>& b, int h, float step8) {
  constexpr float kMagic = 0x1.8p23f;
  const float r = __frcp_rn(step8);
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float x = fabsf(value(b, 8 * h + i)), q = x * r;
    const float a8 = __saturatef(fma32(fma32(-q, step8, x), r, q));
    const float low = fma32(a8, 16.0f, kMagic), mid = fma32(a8, 8.0f, kMagic + 2);
    const float high = fma32(a8, 0x1.333332p+1f, kMagic + 5);
    word =
        word * 16 + __vimin3_s32(bits_of(low), bits_of(mid), bits_of(high));  // positive: ordered as integers
  }
  return (word - 0x4b400000u * 0x11111111u) | signs(b, h);
}

// The same for bf16 where the scale is a power of two, two values a register: x has 8 significant bits and
// step 4, so x / step is a midpoint, or at least 0.53 of bf16's last place away from one; x times 1 / step in
// two parts, `r` and what r lacks, is off by 2^-16 and then rounds to the right side. Two of the three lines
// are one here: bf16's unit is 1/2 below 128 and 1 above it, so a + 126 is rounded just so, and its bits
// count codes from 4 below those of 128. The third is h a + 6 + 128 with the largest bf16 h below 0.1: 6.9 at
// 9, the most there is.
struct ReciprocalPairs {
  __nv_bfloat162 high, low;

  __device__ explicit ReciprocalPairs(float step) {
    const float r = fast_reciprocal(step), rest = r - __low2float(high = __floats2bfloat162_rn(r, r));
    low = __floats2bfloat162_rn(rest, rest);
  }
};
__device__ inline uint32_t codes_in_pairs(const Block<bf16>& b, int h, const ReciprocalPairs& r) {
  constexpr uint32_t kSlope = 0x3dcc3dccu;  // 204 / 2048
  const __nv_bfloat162 first = __float2bfloat162_rn(126), last = __float2bfloat162_rn(134),
                       slope = reinterpret_cast<const __nv_bfloat162&>(kSlope);
  uint32_t code[4];  // in bytes 0 and 2
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitude = b.word[4 * h + i] & 0x7fff7fffu;  // __habs2 would burden the other pipe
    const __nv_bfloat162 x = reinterpret_cast<const __nv_bfloat162&>(magnitude);
    const __nv_bfloat162 a = __hfma2(x, r.high, __hmul2(x, r.low));
    const __nv_bfloat162 c[2] = {__hadd2(a, first), __hfma2(a, slope, last)};
    const auto* u = reinterpret_cast<const uint32_t*>(c);
    code[i] = __viaddmin_s16x2(u[0], 0x00040004u, u[1]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t* word = b.word + 4 * h + 2 * i;
    uint32_t negative;  // bytes of ones where values are
    asm("prmt.b32 %0, %1, %2, 0xfbd9;" : "=r"(negative) : "r"(word[0]), "r"(word[1]));
    code[i] = __byte_perm(code[2 * i], code[2 * i + 1], 0x6240) | (negative & 0x08080808u);
  }
  return __byte_perm(code[0], code[1], 0x7632) * 16 + __byte_perm(code[0], code[1], 0x5410);
}

// Codes of all 16 by true division.
template <class T>
__device__ uint2 codes_by_division(Block<T> b, float step) {
  uint32_t codes[2] = {};
#pragma unroll 1
  for (int i = 0; i < kBlock; ++i) {
    const float x = value(b, 0);
    shift<4>(codes, e2m1_encode(x, x / step));
    shift<8 * sizeof(T)>(b.word, 0);
  }
  return {codes[0], codes[1]};
}

// One block to its 8 bytes under any scale; returns its own. `top` is largest(b). `divides`: even if it need
// not.
template <class T>
__device__ uint8_t quantize_block(const Block<T>& b, uint32_t top, float scale, bool divides, uint2& packed) {
  constexpr uint32_t kLow = (127 - 60) << 23, kHigh = (127 + 60) << 23;  // 2^-60, 2^60
  const uint32_t byte = block_scale(float_of(top), scale);
  const float step = top ? e4m3_decode(byte) * scale : 1.0f;  // zeros are zeros by any step
  uint2 codes;
  if (divides || top > kHigh || bits_of(step) - kLow > kHigh - kLow)
    codes = codes_by_division(b, step);
  else
    codes = {codes_by_quotient(b, 0, 8 * step), codes_by_quotient(b, 1, 8 * step)};
  packed = codes;
  return static_cast<uint8_t>(byte);
}

// A row's power of two (or 0), with what its blocks take from it.
struct RowScale {
  float scale, unit, inverse;  // unit: 1 in a row of zeros, which are zeros by any
  uint32_t tame;  // blocks with a `top` below it take the short way: finite ones, the unit within 2^+-48

  __device__ explicit RowScale(float scale) : scale(scale), unit(scale == 0.0f ? 1.0f : scale) {
    constexpr uint32_t kLow = (127 - 48) << 23, kHigh = (127 + 48) << 23;
    tame = bits_of(unit) - kLow <= kHigh - kLow ? kInfinity : 0;
    inverse = float_of((254u << 23) - bits_of(unit));
  }
};

// The same under a row's scale. Of a tame block, amax / (6 scale) is an exact scaling and a division by 6,
// which the rounded 1/6, too large by 2^-25 of itself, and two FMAs round correctly. For 16-bit values the
// product alone will do: it rounds to the quotient where that is a tie of e4m3, and others lie further away.
template <class T>
__device__ uint8_t quantize_block(const Block<T>& b, uint32_t top, const RowScale& row, uint2& packed) {
  if (top >= row.tame) return quantize_block(b, top, row.scale, true, packed);
  constexpr float kSixth = 0x1.555556p-3f;
  const float amax = float_of(top) * row.inverse;
  float q = amax * kSixth;
  if constexpr (sizeof(T) == 4) q = fma32(fma32(-6.0f, q, amax), kSixth, q);
  const uint32_t byte = e4m3_encode(fmaxf(q, kE4m3Min));
  const float step = e4m3_decode(byte) * row.unit;
  if constexpr (std::is_same_v<T, bf16>) {
    const ReciprocalPairs r(step);
    packed = {codes_in_pairs(b, 0, r), codes_in_pairs(b, 1, r)};
  } else {
    packed = {codes_by_quotient(b, 0, 8 * step), codes_by_quotient(b, 1, 8 * step)};
  }
  return static_cast<uint8_t>(byte);
}

}  // namespace nvfp4::cuda
