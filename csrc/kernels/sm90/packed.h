// Weights in Hopper's own order, `pack_sm90`: the same codes and scales, placed as the threads of the MMA
// decode them. Plain C++, for the operators that pack and unpack as well as for the kernel.
//
// An expert is [N / 64][ceil(K / 128)] blocks of 64 rows x 128 codes, 4,608 bytes each: codes
// [2 units][4 warps][32 lanes][2 steps of K = 64][8 bytes], then scales [2][4][32][2 steps] bytes. Lane
// (g, c) = (lane / 4, lane % 4) owns row 16 warp + 8 unit + row_of(g) and, of each step, the c-th block of 16
// codes. Codes and scales past K are zero.
//
// The 16 codes of a block are 64 bits in two words. pair (h, i) is the codes 8 h + i and 8 h + i + 4 as two
// BF16 numbers v * 2^-126 (decode.cuh): sign in bit 15, exponent and mantissa in bits 8..6. Three pairs of a
// word come out of it by a rotation and a mask; {15, 8, 7, 6} does not tile 16 bits, so the bits that are
// left of both words are the fourth pair of either. Sixteen instructions for eight pairs, against 26 from
// the checkpoint's nibbles.
#pragma once
#include <cstdint>

#include "../formats.h"

namespace nvfp4::sm90 {

constexpr int64_t kPackedRows = 64, kPackedColumns = 128, kPackedSteps = 2;
constexpr int64_t kPackedCodeBytes = kPackedRows * kPackedColumns / 2;
constexpr int64_t kPackedScaleBytes = kPackedRows * kPackedColumns / kBlock;
constexpr int64_t kPackedBytes = kPackedCodeBytes + kPackedScaleBytes;  // of a block

NVFP4_HD constexpr int64_t packed_columns(int64_t K) { return (K + kPackedColumns - 1) / kPackedColumns; }
NVFP4_HD constexpr int64_t packed_bytes(int64_t N, int64_t K) {  // of an expert; N a multiple of 64
  return N / kPackedRows * packed_columns(K) * kPackedBytes;
}

// Where lane g of eight finds its row: even rows for g < 4, odd ones for the rest (weights.cuh's place_of).
NVFP4_HD constexpr int row_of(int g) { return g % 4 * 2 + g / 4; }

// Byte, in a block, of the eight bytes of codes of (row, step, c); its scale is at
// kPackedCodeBytes + this / 8.
NVFP4_HD constexpr int packed_place(int row, int step, int c) {
  const int unit = row / 8 % 2, warp = row / 16, g = row % 2 * 4 + row % 8 / 2;
  return (((unit * 4 + warp) * 32 + g * 4 + c) * 2 + step) * 8;
}

struct Words {
  uint32_t first, second;
};

constexpr uint32_t kPairBits = 0x81c081c0u;
constexpr int kRotate1 = 4, kRotate2 = 10;                        // pairs 1 and 2 of a word; pair 0: none
constexpr int kRotateSecond = 2;                                  // brings the second word's rest
constexpr uint32_t kFirstRest = 0x06030603u;                      // beside the first word's
NVFP4_HD constexpr int rotate_rest(int h) { return h ? 12 : 6; }  // pair 3 of either word, out of both rests

NVFP4_HD constexpr uint32_t rotate_left(uint32_t x, int by) { return x << by | x >> (32 - by); }
NVFP4_HD constexpr uint32_t rotate_right(uint32_t x, int by) { return x >> by | x << (32 - by); }

// Pair i of eight codes in the checkpoint's order.
NVFP4_HD constexpr uint32_t spread(uint32_t codes, int i) {
  const uint32_t nibbles = codes >> 4 * i & 0x000f000fu;
  return (nibbles & 0x00080008u) << 12 | (nibbles & 0x00070007u) << 6;
}
NVFP4_HD constexpr uint32_t gather(uint32_t pair, int i) {
  return ((pair >> 12 & 0x00080008u) | (pair >> 6 & 0x00070007u)) << 4 * i;
}

NVFP4_HD constexpr uint32_t pack_word(uint32_t codes) {  // its pairs 0 to 2
  return spread(codes, 0) | rotate_right(spread(codes, 1), kRotate1) |
         rotate_right(spread(codes, 2), kRotate2);
}
NVFP4_HD constexpr Words pack_block(Words codes) {
  const uint32_t rest = rotate_right(spread(codes.first, 3), rotate_rest(0)) |
                        rotate_right(spread(codes.second, 3), rotate_rest(1));
  return {pack_word(codes.first) | (rest & kFirstRest),
          pack_word(codes.second) | rotate_right(rest & ~kFirstRest, kRotateSecond)};
}

NVFP4_HD constexpr uint32_t rest_of(Words packed) {
  return (packed.first & kFirstRest) | (rotate_left(packed.second, kRotateSecond) & ~kFirstRest);
}
NVFP4_HD constexpr uint32_t unpack_word(uint32_t packed, uint32_t rest, int h) {
  return gather(packed & kPairBits, 0) | gather(rotate_left(packed, kRotate1) & kPairBits, 1) |
         gather(rotate_left(packed, kRotate2) & kPairBits, 2) |
         gather(rotate_left(rest, rotate_rest(h)) & kPairBits, 3);
}
NVFP4_HD constexpr Words unpack_block(Words packed) {
  const uint32_t rest = rest_of(packed);
  return {unpack_word(packed.first, rest, 0), unpack_word(packed.second, rest, 1)};
}

}  // namespace nvfp4::sm90
