// out[r, n] = sum over k of weight[e, n, k] * x[r, k], NVFP4 weights decoded in registers, BF16 tokens.
//
// Weights are the M operand, so that one token pads to 8. A persistent CTA walks tiles of (expert, weight
// rows, tokens); one warp keeps a ring of codes and scales full, one a ring of tokens, and every consumer
// warpgroup decodes 64 rows x K 64 into registers while its tensor core works on the K 64 before. Each output
// is one chain of m64n*k16 products in ascending K, whatever the tile: its bits depend on nothing else in the
// batch.
#pragma once
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // N = 24, 40, 48, ...: without it CuTe splits them
#include <cutlass/arch/reg_reconfig.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "decode.cuh"
#include "gemm_problem.h"
#include "ptx.cuh"
#include "tile.h"

namespace nvfp4::sm90 {

struct Item {
  int expert, row_tile, first_row, count;  // tokens: rows first_row .. first_row + count of the product
};

template <class T>
struct Kernel {
  using Shared = typename T::Shared;
  using bf = cute::bfloat16_t;

  Shared& shared;
  const Problem& problem;
  const GemmParams& p;

  // ---- work ----------------------------------------------------------------------------------------

  __device__ __forceinline__ int rows_before(int e) const {  // offsets may lie
    const int begin = p.offsets ? p.offsets[e] : e ? static_cast<int>(p.R) : 0;
    return min(max(begin, 0), static_cast<int>(p.R));
  }

  // Token tiles and rows before each expert's own, by all threads.
  __device__ __forceinline__ void plan() const {
    const int E = static_cast<int>(p.E);
    for (int e = threadIdx.x; e <= E; e += T::kThreads) {
      const int begin = rows_before(e), rows = e ? max(begin - rows_before(e - 1), 0) : 0;
      shared.first[e] = {(rows + T::kTokens - 1) / T::kTokens, begin};
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    int sum = 0;
    for (int first = 0; first <= E; first += 32) {
      const int e = first + static_cast<int>(threadIdx.x);
      int x = e <= E ? shared.first[e].x : 0;
      for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(~0u, x, step);
        if (static_cast<int>(threadIdx.x) >= step) x += before;
      }
      if (e <= E) shared.first[e].x = sum + x;
      sum += __shfl_sync(~0u, x, 31);
    }
  }

  __device__ __forceinline__ bool item(int index, Item& item) const {
    const int E = static_cast<int>(p.E);
    if (index >= shared.first[E].x * problem.row_tiles) return false;
    int low = 0, high = E;  // the last expert that begins at or before this item
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (shared.first[middle].x * problem.row_tiles <= index ? low : high) = middle;
    }
    const int2 first = shared.first[low], next = shared.first[low + 1];
    const int local = index - first.x * problem.row_tiles, tiles = next.x - first.x;
    const int rows = next.y - first.y, each = ((rows + tiles - 1) / tiles + 7) / 8 * 8;
    const int begin = local % tiles * each;
    item = {low, local / tiles, first.y + begin, min(each, rows - begin)};
    return true;
  }

  // First weight row, within the expert, of the tile's low (0) or high (1) half.
  __device__ __forceinline__ int half_row(const Item& item, int half) const {
    if (problem.gated) return item.row_tile * T::kHalf + half * static_cast<int>(p.N / 2);
    return item.row_tile * T::kRows + half * T::kHalf;
  }

  // The row of `a` that row r of the product reads.
  __device__ __forceinline__ int source_row(int r) const {
    if (!p.rows) return r;
    return min(max(p.rows[r], 0), static_cast<int>(p.a_rows) - 1);
  }

  // ---- producers -----------------------------------------------------------------------------------

  __device__ __forceinline__ void load_weights(const CUtensorMap* map) const {
    const int64_t columns = problem.sf_columns;
    const int64_t expert_sf = (p.N + 127) / 128 * columns * kSfColumnBytes;
    int stage = 0;
    uint32_t parity = 1;
    Item it;
    for (int index = blockIdx.x; item(index, it); index += gridDim.x) {
      for (int step = 0; step < problem.steps; step += kStageSteps) {
        barrier_sleep(&shared.weights_free[stage], parity);
        uint64_t* full = &shared.weights_full[stage];
        const uint32_t strip = min(kStageSteps, problem.sf_columns - step) * kSfColumnBytes;
        uint32_t strips = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = half_row(it, half), last = min(row + T::kHalf, static_cast<int>(p.N)) - 1;
          strips += row <= last ? last / 128 - row / 128 + 1 : 0;
        }
        barrier_expect(full, T::kRows * kCodeBytes + strips * strip);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = half_row(it, half), last = min(row + T::kHalf, static_cast<int>(p.N)) - 1;
          copy_box(shared.codes[stage] + half * T::kHalf * kCodeBytes, map, step * 32,
                   it.expert * static_cast<int>(p.N) + row, full);
          const uint8_t* sf = p.b_sf + it.expert * expert_sf + static_cast<int64_t>(step) * kSfColumnBytes;
          if (row <= last)
            for (int a = row / 128; a <= last / 128; ++a)
              copy_bytes(shared.scales[stage][half][a - row / 128], sf + a * columns * kSfColumnBytes, strip,
                         full);
        }
        if (++stage == T::kWeightStages) stage = 0, parity ^= 1;
      }
    }
  }

  // Rows past the tile's own come along: their columns of the product are not stored.
  __device__ __forceinline__ void load_tokens(const CUtensorMap* map) const {
    int stage = 0;
    uint32_t parity = 1;
    Item it;
    for (int index = blockIdx.x; item(index, it); index += gridDim.x) {
      for (int step = 0; step < problem.steps; step += T::kSlabs) {
        barrier_sleep(&shared.tokens_free[stage], parity);
        uint64_t* full = &shared.tokens_full[stage];
        barrier_expect(full, T::kSlabs * T::kSlabBytes);
#pragma unroll
        for (int slab = 0; slab < T::kSlabs; ++slab)
          copy_box(shared.tokens[stage] + slab * T::kSlabBytes, map, (step + slab) * 64, it.first_row, full);
        if (++stage == T::kTokenStages) stage = 0, parity ^= 1;
      }
    }
  }

  // ---- consumers -----------------------------------------------------------------------------------

  // Thread (g = lane / 4, c = lane % 4) of warp w holds rows g and g + 8 of the warp's 16: the low and the
  // high row of one place in the half tile. Eight places of a warp keep shared memory free of conflicts: even
  // rows for g < 4, odd ones for the rest.
  __device__ __forceinline__ static int place(int unit, int warp, int g) {
    return unit / 2 * 64 + warp * 16 + unit % 2 * 8 + (g % 4 * 2 + g / 4);
  }

  template <int N>
  using Mma = decltype(cute::make_tiled_mma(
      decltype(cute::GMMA::rs_op_selector<bf, bf, float,
                                          cute::Shape<cute::_64, cute::Int<N>, cute::_64>>()){}));
  template <int N>
  using Accumulator = decltype(cute::partition_fragment_C(Mma<N>{}, cute::Shape<cute::_64, cute::Int<N>>{}));

  // The operand of N tokens: K 64 by stage of a slab that has room for kTokens.
  template <int N>
  __device__ __forceinline__ auto token_slabs() const {
    using namespace cute;
    const auto slab = make_tensor(make_smem_ptr(reinterpret_cast<bf*>(shared.tokens[0])),
                                  tile_to_shape(GMMA::Layout_K_SW128_Atom<bf>{}, Shape<Int<N>, _64>{}));
    const auto one = Mma<N>{}.get_slice(0).partition_fragment_B(slab);
    return make_tensor(one.data(), append<4>(one.layout(), make_layout(Int<T::kTokenStages * T::kSlabs>{},
                                                                       Int<T::kSlabBytes / 16>{})));
  }

  struct Pipe {
    int weights = 0, tokens = 0, held = -1;  // stages; held: tokens that products under way still read
    uint32_t weights_parity = 0, tokens_parity = 0;
  };

  // What a thread reads of a stage, as byte offsets.
  struct Places {
    uint32_t codes;                 // of unit 0's low row at step 0; step s: ^ 32 s, the swizzle
    uint32_t scales[2][T::kUnits];  // low, high
    int steps;        // of this lane's columns: past them a scale is padding, and may be anything
    uint32_t select;  // the lane's two scale bytes out of two words
  };

  // A value the compiler cannot work out again: it would, in the inner loop, to save registers.
  __device__ __forceinline__ static void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }

  __device__ __forceinline__ Places places(const Item& it, int group, int warp, int lane) const {
    const int g = lane / 4, c = lane % 4, first = place(group * T::kUnits, warp, g);
    Places at;
    at.codes = first * kCodeBytes + ((c / 2 ^ first % 8) << 4) + c % 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int u = 0; u < T::kUnits; ++u) {
        const int row = half_row(it, half) % 128 + place(group * T::kUnits + u, warp, g);
        at.scales[half][u] = (half * T::kStrips + row / 128) * kStripBytes + row % 32 * 16 + row / 32 % 4 * 4;
      }
    at.select = c | (8 | c) << 4 | (4 + c) << 8 | (12 + c) << 12;  // no scale is negative: sign bytes are 0
    at.steps = static_cast<int>((p.K / kBlock + 3 - c) / 4);
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

  __device__ __forceinline__ static Raw load(const Places& at, uint32_t codes, uint32_t scales, int s,
                                             int u) {
    const uint32_t row = (codes ^ 32 * s) + u * 8 * kCodeBytes;
    return {load_words(row), load_words(row + T::kHalf * kCodeBytes),
            load_word(scales + at.scales[0][u] + s * kSfColumnBytes),
            load_word(scales + at.scales[1][u] + s * kSfColumnBytes)};
  }

  using Operands = decltype(cute::make_tensor<bf>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<4 * T::kGroup>>{}));

  __device__ __forceinline__ void release_tokens(Pipe& pipe, bool arrives) const {
    if (pipe.held < 0) return;
    if (arrives) barrier_arrive(&shared.tokens_free[pipe.held]);
    pipe.held = -1;
  }

  // A warpgroup decodes kGroup steps of K, then gives its tensor core all their products at once, and decodes
  // into the other buffer meanwhile.
  template <int N>
  __device__ __forceinline__ void multiply_tile(Pipe& pipe, const Places& at,
                                                Accumulator<N> (&acc)[T::kUnits],
                                                uint32_t (&worst)[T::kUnits]) const {
    using namespace cute;
    const Mma<N> tiled;
    const auto b = token_slabs<N>();
    Operands operands[T::kBuffers];
    const bool arrives = threadIdx.x % 32 == 0;
    constexpr int kUnits = T::kUnits, kGroup = T::kGroup, kRound = T::kRound;

    for (int step = 0; step < problem.steps; step += kStageSteps) {
      barrier_wait(&shared.weights_full[pipe.weights], pipe.weights_parity);
      const uint32_t codes = shared_address(shared.codes[pipe.weights]) + at.codes,
                     scales = shared_address(shared.scales[pipe.weights]);
      Raw raw = load(at, codes, scales, 0, 0);
#pragma unroll
      for (int s = 0; s < kStageSteps; s += kGroup) {
        if (s % kRound == 0 && step + s >= problem.steps) break;
        if (s % T::kSlabs == 0) barrier_wait(&shared.tokens_full[pipe.tokens], pipe.tokens_parity);
        const int slab = __shfl_sync(~0u, pipe.tokens, 0) * T::kSlabs + s % T::kSlabs;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          auto& a = operands[(s / kGroup * kUnits + u) % T::kBuffers];
#pragma unroll
          for (int q = 0; q < kGroup; ++q) {
            const Raw now = raw;
            if (q + 1 < kGroup) raw = load(at, codes, scales, s + q + 1, u);
            uint32_t bytes = permute_bytes(now.low_scales, now.high_scales, at.select);
            if (step + s + q >= at.steps) bytes = 0;
            worst[u] = __vmaxu2(worst[u], bytes);
            decode(now.low, now.high, decode_scales(bytes),
                   *reinterpret_cast<uint32_t (*)[16]>(raw_pointer_cast(a(_, _, 4 * q).data())));
          }
          warpgroup_fence_operand(acc[u]);
          warpgroup_arrive();
#pragma unroll
          for (int k = 0; k < 4 * kGroup; ++k)
            cute::gemm(tiled, a(_, _, k), b(_, _, k % 4, slab + k / 4), acc[u]);
          warpgroup_commit_batch();
          if (u + 1 < kUnits)
            raw = load(at, codes, scales, s, u + 1);
          else if (s + kGroup < kStageSteps)
            raw = load(at, codes, scales, s + kGroup, 0);
          warpgroup_wait<1>();
          release_tokens(pipe, arrives);
        }
        if (s % T::kSlabs == T::kSlabs - kGroup) next_tokens(pipe);
      }
      __syncwarp();  // the arrival speaks for loads of all lanes
      if (arrives) barrier_arrive(&shared.weights_free[pipe.weights]);
      if (++pipe.weights == T::kWeightStages) pipe.weights = 0, pipe.weights_parity ^= 1;
    }
    warpgroup_wait<0>();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) warpgroup_fence_operand(acc[u]);
    constexpr int kLast = T::kSlabs - kRound;
    if (problem.steps % T::kSlabs > 0 &&
        problem.steps % T::kSlabs <= kLast)  // the last tokens were not used up
      next_tokens(pipe);
    release_tokens(pipe, arrives);
  }

  __device__ __forceinline__ void next_tokens(Pipe& pipe) const {
    pipe.held = pipe.tokens;
    if (++pipe.tokens == T::kTokenStages) pipe.tokens = 0, pipe.tokens_parity ^= 1;
  }

  template <int N>
  __device__ __forceinline__ void compute(Pipe& pipe, const Item& item) const;  // epilogue.cuh
  __device__ __forceinline__ void consume() const;
};

}  // namespace nvfp4::sm90
