// exp, sigmoid, softplus and the activations: our own, so that routing and activations have the same bits on
// every chip. IEEE operations only: every fused multiply-add is written out, the compilers fuse nothing
// (-ffp-contract=off, -fmad=false). nvfp4_moe/reference/numbers.py says the same in torch.
#pragma once
#include <cmath>

#include "formats.h"

namespace nvfp4 {

NVFP4_HD float fma32(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// 1 / d, rounded correctly for 2^-126 <= d <= 2^126: one Newton step from the hardware's estimate, which nvcc
// emits too, behind a branch for other d. Compared with IEEE's over all 2^23 mantissas on an H200.
NVFP4_HD float reciprocal_inside(float d) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return fma32(r, fma32(-d, r, 1.0f), r);
#else
  return 1.0f / d;
#endif
}
// For d >= 2^-126: 0 above 2^126, where the true value may be subnormal.
NVFP4_HD float reciprocal32(float d) { return d > 0x1p126f ? 0.0f : reciprocal_inside(d); }

// The square root, rounded correctly, without the branch of nvcc's for small x: those are scaled.
NVFP4_HD float sqrt32(float x) {
#ifdef __CUDA_ARCH__
  const bool small = x < 0x1p-60f;
  const float a = x * (small ? 0x1p64f : 1.0f);
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  const float s = a * r, root = fma32(fma32(-s, s, a), 0.5f * r, s);
  return a > 0.0f && a < float_of(0x7f800000u) ? root * (small ? 0x1p-32f : 1.0f) : x;  // softplus is not < 0
#else
  return __builtin_sqrtf(x);
#endif
}

// 2^n * 2^f for whole -125 <= n <= 125 in the low bits of `n_bits`, |f| <= 1/2: a minimax polynomial of
// degree 5 that is 1 at 0. Degree 6 would halve the error of 2 ulp and cost swiglu_quantize 3 % (H200).
NVFP4_HD float exp2_parts(uint32_t n_bits, float f) {
  float p = 0x1.5bb9e6p-10f;
  p = fma32(p, f, 0x1.3ceab6p-7f);
  p = fma32(p, f, 0x1.c6b754p-5f);
  p = fma32(p, f, 0x1.ebf9bcp-3f);
  p = fma32(p, f, 0x1.62e42ap-1f);
  p = fma32(p, f, 1.0f);
  return float_of(bits_of(p) + (n_bits << 23));
}

constexpr float kLog2e = 0x1.715476p+0f, kLog2eRest = 0x1.4ae0c0p-26f;  // together to 2^-49
constexpr float kExp2Most = 125.0f;  // beyond, exp is 0 or infinity: it and 1 / (1 + exp) are never subnormal

// 2^z with its ends, y = 2^z between them. NaN passes through.
NVFP4_HD float exp2_ends(float z, float y) {
  const float beyond = z < 0.0f ? 0.0f : z * float_of(0x7f800000u);
  return abs_of(z) <= kExp2Most ? y : beyond;
}

// 2^(x slope) without its ends. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
NVFP4_HD float exp_slope_inside(float x, float slope) {
  const float shifted = fma32(x, slope, 0x1.8p23f), n = shifted - 0x1.8p23f;
  return exp2_parts(bits_of(shifted), fma32(x, slope, -n));
}

// exp(x) within 2.3 ulp; 0 and infinity beyond |x| = 86.6.
NVFP4_HD float exp32(float x) {
  const float shifted = fma32(x, kLog2e, 0x1.8p23f), n = shifted - 0x1.8p23f;
  const float f = fma32(x, kLog2eRest, fma32(x, kLog2e, -n));
  return exp2_ends(x * kLog2e, exp2_parts(bits_of(shifted), f));
}

NVFP4_HD float sigmoid32(float x) { return reciprocal32(1.0f + exp32(-x)); }

// log(1 + u) for 0 <= u <= 1: 2 atanh(s), s = u / (2 + u) <= 1/3, as a series in s^2 (remainder below 2^-28).
NVFP4_HD float log1p32(float u) {
  const float s = u * reciprocal32(2.0f + u), z = s * s;
  float p = 0x1.111112p-4f;  // 1/15
  p = fma32(p, z, 0x1.3b13b2p-4f);
  p = fma32(p, z, 0x1.745d18p-4f);
  p = fma32(p, z, 0x1.c71c72p-4f);
  p = fma32(p, z, 0x1.24924ap-3f);
  p = fma32(p, z, 0x1.99999ap-3f);
  p = fma32(p, z, 0x1.555556p-2f);
  p = fma32(p, z, 1.0f);
  return 2.0f * (s * p);
}

NVFP4_HD float softplus32(float x) { return (x > 0.0f ? x : 0.0f) + log1p32(exp32(-abs_of(x))); }

enum class Act { silu, swiglu_limit, swiglu_oai, relu2 };

// g * sigmoid(beta g). The exponent is one product, g * slope, within 2^-24 of itself: what becomes of it is
// rounded to BF16.
NVFP4_HD float swish_slope(float beta) { return -(beta * kLog2e); }
NVFP4_HD float swish_inside(float g, float slope) {  // |g slope| <= kExp2Most
  return g * reciprocal_inside(1.0f + exp_slope_inside(g, slope));
}
NVFP4_HD float swish32(float g, float beta) {
  const float slope = swish_slope(beta);
  return g * reciprocal32(1.0f + exp2_ends(g * slope, exp_slope_inside(g, slope)));
}

// One output of the activation; relu2 has no `up`. Comparisons are written so that NaN passes through.
template <Act act>
NVFP4_HD float activate(float gate, float up, float act_alpha, float limit) {
  if (act == Act::relu2) {
    const float r = gate < 0.0f ? 0.0f : gate;
    return r * r;
  }
  if (act == Act::silu) return swish32(gate, 1.0f) * up;
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  if (act == Act::swiglu_limit) return swish32(g, 1.0f) * u;
  const float s = swish32(g, act_alpha);
  return fma32(s, u, s);  // times u + 1
}

// ---- quantization: design rules of one block and one row ------------------------------------------

// The smallest power of two >= amax / 2688, read off the bits: 2688 = 1.3125 * 2^11. Never below the smallest
// normal; 0 for an all-zero row.
NVFP4_HD float row_scale(float amax) {
  const uint32_t u = bits_of(amax);
  if (u == 0) return 0.0f;
  const int p = static_cast<int>(u >> 23) - 127 - 11 + ((u & 0x7fffffu) > 0x280000u);
  return pow2(p < -126 ? -126 : p);
}

// The e4m3 scale of a block from its largest magnitude (NaN if it holds one) and the global scale.
NVFP4_HD uint32_t block_scale(float amax, float scale) {
  const float q = amax / (kE2m1Max * scale);
  if (is_nan(q)) return amax == 0.0f ? 0x01 : kE4m3NaN;  // 0/0 counts as 0; chips differ in a NaN's sign
  return e4m3_encode(q < kE4m3Min ? kE4m3Min : q);
}

}  // namespace nvfp4
