// NVFP4 -> BF16 in registers, exactly. A code's exponent and mantissa bits go to bits 8..6 of a BF16, its
// sign to bit 15: that is v * 2^-126 (0.5 is a subnormal, which BF16 multiplication keeps). The block scale
// comes as s * 2^119, so the product is v * s * 2^-7: at most 6 significant bits, no rounding anywhere.
#pragma once
#include <cstdint>

#include "packed.h"

namespace nvfp4::sm90 {

constexpr float kDecodedUnit = 128.0f;  // accumulators are sums of v * s * 2^-7

__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ uint32_t multiply_low(uint32_t a,
                                                 uint32_t scales) {  // by the scale in the low half
  uint32_t product;
  asm("{.reg .b16 l, h; .reg .b32 s; mov.b32 {l, h}, %2; mov.b32 s, {l, l}; mul.rn.bf16x2 %0, %1, s;}"
      : "=r"(product)
      : "r"(a), "r"(scales));
  return product;
}
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t scales) {
  uint32_t product;
  asm("{.reg .b16 l, h; .reg .b32 s; mov.b32 {l, h}, %2; mov.b32 s, {h, h}; mul.rn.bf16x2 %0, %1, s;}"
      : "=r"(product)
      : "r"(a), "r"(scales));
  return product;
}

// Four bytes of {a, b} by PRMT's selector; __byte_perm would drop the bit that asks for a byte's sign.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// E4M3 bytes in bits 6..0 of either half -> BF16 pair s * 2^119. Shifted by four, a byte is s * 2^-120 in
// BF16, subnormals included; 2^239 takes two steps.
__device__ __forceinline__ uint32_t decode_scales(uint32_t bytes) {
  return multiply(multiply(bytes * 16, 0x7f007f00u), 0x77807780u);  // 2^127, 2^112
}

// Pair i of a word of eight codes: codes i and i + 4, unscaled. The product copies a nibble to both places,
// six bits apart: a multiplication instead of two shifts, for the integer pipe is what bounds the decode.
template <int i>
__device__ __forceinline__ uint32_t pair_of(uint32_t word, uint32_t word_by_8) {
  const uint32_t w = i < 2 ? word : word_by_8;
  const uint32_t nibbles = i % 2 == 0 ? (w & 0x000f000fu) * 0x1040u : (w & 0x00f000f0u) * 0x0104u;
  return nibbles & 0x81c081c0u;
}

// Sixteen codes of two rows (words lo[2], hi[2]) -> the A operands of four m64n*k16: step j takes pairs
// 2(j%2) and 2(j%2)+1 of word j/2.
__device__ __forceinline__ void decode(const uint2& lo, const uint2& hi, uint32_t scales, uint32_t (&a)[16]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t l = h ? lo.y : lo.x, u = h ? hi.y : hi.x, l8 = l >> 8, u8 = u >> 8;
    uint32_t* out = a + 8 * h;
    out[0] = multiply_low(pair_of<0>(l, l8), scales);
    out[1] = multiply_high(pair_of<0>(u, u8), scales);
    out[2] = multiply_low(pair_of<1>(l, l8), scales);
    out[3] = multiply_high(pair_of<1>(u, u8), scales);
    out[4] = multiply_low(pair_of<2>(l, l8), scales);
    out[5] = multiply_high(pair_of<2>(u, u8), scales);
    out[6] = multiply_low(pair_of<3>(l, l8), scales);
    out[7] = multiply_high(pair_of<3>(u, u8), scales);
  }
}

// The same from Hopper's own order, pair for pair.
__device__ __forceinline__ void decode(const Words& lo, const Words& hi, uint32_t scales, uint32_t (&a)[16]) {
  const uint32_t rests[] = {rest_of(lo), rest_of(hi)};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t words[] = {h ? lo.second : lo.first, h ? hi.second : hi.first};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t w = words[row];
      const uint32_t pairs[] = {w, rotate_left(w, kRotate1), rotate_left(w, kRotate2),
                                rotate_left(rests[row], rotate_rest(h))};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[8 * h + 2 * i + row] =
            row ? multiply_high(pairs[i] & kPairBits, scales) : multiply_low(pairs[i] & kPairBits, scales);
    }
  }
}

// The order of K inside a chunk of 64 in which decode() yields it: position 32 h + 8 i + 2 c + b holds
// k = 16 c + 8 h + 4 b + i (lane c's block, word h, pair i, half b).
constexpr int kOrderChunk = 64;

}  // namespace nvfp4::sm90
