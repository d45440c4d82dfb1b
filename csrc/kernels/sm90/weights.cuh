// How a stage of weights comes into shared memory, and a thread's part of it into registers: from the
// checkpoint's layout, and from Hopper's own.
#pragma once
#include "decode.cuh"
#include "gemm_problem.h"
#include "ptx.cuh"
#include "tile.h"

namespace nvfp4::sm90 {

// Thread (g = lane / 4, c = lane % 4) of warp w holds rows g and g + 8 of the warp's 16: the low and the high
// row of one place in the half tile. Eight places of a warp keep shared memory free of conflicts: even rows
// for g < 4, odd ones for the rest.
__device__ __forceinline__ int place_of(int unit, int warp, int g) {
  return unit / 2 * 64 + warp * 16 + unit % 2 * 8 + row_of(g);
}

// A value the compiler cannot work out again: it would, in the inner loop, to save registers.
__device__ __forceinline__ void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }

struct Base {  // addresses a thread reads in one stage
  uint32_t codes, scales;
};

// Codes in swizzled boxes of 128-byte rows, 256 codes; atoms of interleaved scales: 128 rows, one step of K.
template <class T>
struct PlainWeights {
  static constexpr int kRawSteps = 1, kCodeBytes = 128;
  static constexpr int kStripBytes = kStageSteps * kSfColumnBytes;         // a stage's scales of 128 rows
  static constexpr int kStrips = (T::kHalf + 127) / 128 + T::kHalf / 128;  // that half a tile may touch

  struct Stage {
    alignas(1024) uint8_t codes[T::kRows * kCodeBytes];
    uint8_t scales[2][kStrips][kStripBytes];
  };

  // An item's, for the thread that brings them: what is the same for all its stages is worked out once.
  struct Source {
    const CUtensorMap* map;
    const uint8_t* scales[2];  // of the halves' first strips
    int64_t strip_bytes;
    int code_rows[2], strips[2], steps;

    // rows: the first of the tile's halves.
    __device__ __forceinline__ Source(const Problem& problem, const CUtensorMap* map, int expert,
                                      const int (&rows)[2])
        : map(map), strip_bytes(problem.sf_strip), steps(problem.steps) {
      const int N = static_cast<int>(problem.p.N);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = rows[half], last = min(row + T::kHalf, N) - 1;
        code_rows[half] = expert * N + row;
        strips[half] = row <= last ? last / 128 - row / 128 + 1 : 0;
        scales[half] = problem.p.b_sf + expert * problem.sf_expert + row / 128 * problem.sf_strip;
      }
    }

    __device__ __forceinline__ void bring(Stage& stage, int step, uint64_t* full) const {
      const uint32_t strip = min(kStageSteps, steps - step) * kSfColumnBytes;
      barrier_expect(full, T::kRows * kCodeBytes + (strips[0] + strips[1]) * strip);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        copy_box(stage.codes + half * T::kHalf * kCodeBytes, map, step * 32, code_rows[half], full);
        const uint8_t* from = scales[half] + step * kSfColumnBytes;
#pragma unroll
        for (int i = 0; i < kStrips; ++i, from += strip_bytes)
          if (i < strips[half]) copy_bytes(stage.scales[half][i], from, strip, full);
      }
    }
  };

  // What a thread reads of a stage, as byte offsets.
  struct Places {
    uint32_t codes;                 // of unit 0's low row at step 0; step s: ^ 32 s, the swizzle
    uint32_t scales[2][T::kUnits];  // low, high
    int steps;        // of this lane's columns: past them a scale is padding, and may be anything
    uint32_t select;  // the lane's two scale bytes out of two words
  };

  __device__ __forceinline__ static Places places(const Problem& problem, const int (&rows)[2], int group,
                                                  int warp, int lane) {
    const int g = lane / 4, c = lane % 4, first = place_of(group * T::kUnits, warp, g);
    Places at;
    at.codes = first * kCodeBytes + ((c / 2 ^ first % 8) << 4) + c % 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int u = 0; u < T::kUnits; ++u) {
        const int row = rows[half] % 128 + place_of(group * T::kUnits + u, warp, g);
        at.scales[half][u] = (half * kStrips + row / 128) * kStripBytes + row % 32 * 16 + row / 32 % 4 * 4;
      }
    at.select = c | (8 | c) << 4 | (4 + c) << 8 | (12 + c) << 12;  // no scale is negative: sign bytes are 0
    at.steps = static_cast<int>((problem.p.K / kBlock + 3 - c) / 4);
    keep(at.codes);
    keep(at.select);
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) keep(at.scales[0][u]), keep(at.scales[1][u]);
    return at;
  }

  struct Raw {  // a thread's part of 64 rows x K 64
    uint2 low, high;
    uint32_t low_scales, high_scales;
  };

  __device__ __forceinline__ static Base base(const Places& at, uint32_t stage) {
    return {stage + at.codes, stage + T::kRows * kCodeBytes};
  }
  __device__ __forceinline__ static Raw load(const Places& at, const Base& base, int s, int u) {
    const uint32_t row = (base.codes ^ 32 * s) + place_of(u, 0, 0) * kCodeBytes;
    return {load_words(row), load_words(row + T::kHalf * kCodeBytes),
            load_word(base.scales + at.scales[0][u] + s * kSfColumnBytes),
            load_word(base.scales + at.scales[1][u] + s * kSfColumnBytes)};
  }

  // The A operands of four m64n*k16; `worst`: the greatest scales seen, low and high.
  __device__ __forceinline__ static void decode(const Raw& raw, const Places& at, int, int step,
                                                uint32_t& worst, uint32_t (&a)[16]) {
    uint32_t bytes = permute_bytes(raw.low_scales, raw.high_scales, at.select);
    if (step >= at.steps) bytes = 0;
    worst = __vmaxu2(worst, bytes);
    sm90::decode(raw.low, raw.high, decode_scales(bytes), a);
  }
};

// Blocks of packed.h as they lie.
template <class T>
struct PackedWeights {
  // Both steps of a block at once; where a warpgroup has several units, registers are for accumulators.
  static constexpr int kRawSteps = T::kUnits == 1 ? kPackedSteps : 1, kBlocks = kStageSteps / kPackedSteps;
  static constexpr int kStrips = T::kHalf / kPackedRows;
  static constexpr int kUnitBytes = kPackedCodeBytes / 2, kStripBytes = kBlocks * kPackedBytes;

  struct Stage {
    uint8_t blocks[2][kStrips][kBlocks][kPackedBytes];
  };

  struct Source {              // as PlainWeights'
    const uint8_t* blocks[2];  // of the halves' first strips
    int64_t strip_bytes;
    int strips[2], columns;
    uint32_t whole;  // bytes of a stage

    __device__ __forceinline__ Source(const Problem& problem, const CUtensorMap*, int expert,
                                      const int (&rows)[2])
        : columns(static_cast<int>(packed_columns(problem.p.K))), whole(0) {
      const int all = static_cast<int>(problem.p.N / kPackedRows);
      strip_bytes = int64_t{columns} * kPackedBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = rows[half] / kPackedRows;
        strips[half] = min(max(all - first, 0), kStrips);
        whole += strips[half] * kStripBytes;
        blocks[half] = problem.p.b + (int64_t{expert} * all + first) * strip_bytes;
      }
    }

    // Where K ends half-way through a stage its last block comes twice: tokens past K are zero.
    __device__ __forceinline__ void bring(Stage& stage, int step, uint64_t* full) const {
      const int column = step / kPackedSteps;
      barrier_expect(full, whole);
      if (columns - column >= kBlocks) return copy(stage, 0, column, kStripBytes, full);
      for (int block = 0; block < kBlocks; ++block) copy(stage, block, column, kPackedBytes, full);
    }

    __device__ __forceinline__ void copy(Stage& stage, int block, int column, uint32_t bytes,
                                         uint64_t* full) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from = blocks[half] + column * kPackedBytes;
#pragma unroll
        for (int i = 0; i < kStrips; ++i, from += strip_bytes)
          if (i < strips[half]) copy_bytes(stage.blocks[half][i][block], from, bytes, full);
      }
    }
  };

  struct Places {
    uint32_t codes, scales;
  };

  __device__ __forceinline__ static Places places(const Problem&, const int (&)[2], int group, int warp,
                                                  int lane) {
    const int unit = group * T::kUnits, thread = warp * 32 + lane;
    const uint32_t strip = unit / 2 * kStripBytes;
    Places at{strip + unit % 2 * kUnitBytes + thread * 16,
              strip + static_cast<uint32_t>(kPackedCodeBytes) + unit % 2 * (kUnitBytes / 8) + thread * 2};
    keep(at.codes);
    keep(at.scales);
    return at;
  }

  struct Raw {  // a thread's part of 64 rows x kRawSteps
    Words low[kRawSteps], high[kRawSteps];
    uint32_t low_scales, high_scales;
  };

  __device__ __forceinline__ static Base base(const Places& at, uint32_t stage) {
    return {stage + at.codes, stage + at.scales};
  }
  __device__ __forceinline__ static Raw load(const Places&, const Base& base, int s, int u) {
    constexpr int kHigh = kStrips * kStripBytes;
    const uint32_t block = u / 2 * kStripBytes + s / kPackedSteps * kPackedBytes,
                   codes = base.codes + block + u % 2 * kUnitBytes + s % kPackedSteps * 8,
                   scales = base.scales + block + u % 2 * (kUnitBytes / 8) + s % kPackedSteps;
    if constexpr (kRawSteps == 1) {
      const uint2 low = load_words(codes), high = load_words(codes + kHigh);
      return {{{low.x, low.y}}, {{high.x, high.y}}, load_byte(scales), load_byte(scales + kHigh)};
    } else {
      const uint4 low = load_quad(codes), high = load_quad(codes + kHigh);
      return {{{low.x, low.y}, {low.z, low.w}},
              {{high.x, high.y}, {high.z, high.w}},
              load_half(scales),
              load_half(scales + kHigh)};
    }
  }

  __device__ __forceinline__ static void decode(const Raw& raw, const Places&, int s, int, uint32_t& worst,
                                                uint32_t (&a)[16]) {
    const uint32_t bytes = permute_bytes(raw.low_scales, raw.high_scales, s ? 0xd591 : 0xc480);
    worst = __vmaxu2(worst, bytes);
    sm90::decode(raw.low[s], raw.high[s], decode_scales(bytes), a);
  }
};

}  // namespace nvfp4::sm90
