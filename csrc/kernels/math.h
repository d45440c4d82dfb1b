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

// exp(x) = 2^n * exp(r), |r| <= ln2/2: a Taylor polynomial of degree 7 (its remainder is 0.05 ulp). Within 1
// ulp.
NVFP4_HD float exp32(float x) {
  const float t = is_nan(x) ? 0.0f : x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding and taking it away rounds to an integer
  const float n = t * 0x1.715476p+0f + magic - magic;
  float r = fma32(n, -0x1.62e400p-1f, t);  // ln2 in two parts; n times the first is exact
  r = fma32(n, -0x1.7f7d1cp-20f, r);
  float p = 0x1.a01a02p-13f;  // 1/7!
  p = fma32(p, r, 0x1.6c16c2p-10f);
  p = fma32(p, r, 0x1.111112p-7f);
  p = fma32(p, r, 0x1.555556p-5f);
  p = fma32(p, r, 0x1.555556p-3f);
  p = fma32(p, r, 0.5f);
  p = fma32(p, r, 1.0f);
  p = fma32(p, r, 1.0f);
  const int k = static_cast<int>(n),
            half = k >> 1;  // two steps: only the second can round (subnormal results)
  const float y = p * pow2(half) * pow2(k - half);
  const float bounded = x < -104.0f ? 0.0f : x > 0x1.62e42ep+6f ? float_of(0x7f800000u) : y;  // ln(FLT_MAX)
  return is_nan(x) ? x : bounded;
}

NVFP4_HD float sigmoid32(float x) { return 1.0f / (1.0f + exp32(-x)); }

// log(1 + u) for 0 <= u <= 1: 2 atanh(s), s = u / (2 + u) <= 1/3, as a series in s^2 (remainder below 2^-28).
NVFP4_HD float log1p32(float u) {
  const float s = u / (2.0f + u), z = s * s;
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

NVFP4_HD float swish32(float g, float beta) {
  return g / (1.0f + exp32(-(beta * g)));
}  // g * sigmoid(beta g)

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
  return swish32(g, act_alpha) * (u + 1.0f);
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
