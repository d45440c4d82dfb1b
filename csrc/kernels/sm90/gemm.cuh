// out[r, n] = sum over k of weight[e, n, k] * x[r, k], NVFP4 weights decoded in registers, BF16 tokens.
//
// Weights are the M operand, so that one token pads to 8. A persistent CTA walks tiles of (expert, weight
// rows, tokens); one warp keeps a ring of codes and scales full, one a ring of tokens, and every consumer
// warpgroup decodes 64 rows x K 64 into registers while its tensor core works on the K 64 before (narrow.cuh:
// every warp, 16 rows). Each output is one chain of k16 products in ascending K, whatever the tile: its bits
// depend on nothing else in the batch.
#pragma once
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // N = 24, 40, 48, ...: without it CuTe splits them
#include <cutlass/arch/reg_reconfig.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "gemm_problem.h"
#include "ptx.cuh"
#include "tile.h"
#include "weights.cuh"

namespace nvfp4::sm90 {

struct alignas(16) Item {
  int expert, row_tile, first_row, count;  // tokens: rows first_row .. first_row + count of the product
};

struct alignas(16) Part {  // of an item: steps of K
  int index, begin, end;
};

struct Work {  // of a CTA
  Item item;
  Part part;
};

template <class T, template <class> class Weights_>
struct Kernel {
  using Tile = T;
  using Weights = Weights_<T>;
  using bf = cute::bfloat16_t;

  struct Shared {
    alignas(1024) typename Weights::Stage weights[T::kWeightStages];
    alignas(1024) uint8_t tokens[T::kTokenStages][T::kSlabs * T::kSlabBytes];
    float factors[T::kRows][2];  // alpha and bias, by warps
    alignas(16) uint8_t out[T::kWarpgroups][2 * T::kUnits][T::kPlaneBytes];
    uint64_t weights_full[T::kWeightStages], weights_free[T::kWeightStages];
    uint64_t tokens_full[T::kTokenStages], tokens_free[T::kTokenStages];
    Work work[T::kWeightStages + 1];  // in turn: the producer is no more items ahead than it has stages
    int2 first[1];                    // [E + 1] token tiles and rows before an expert's own
  };
  static_assert(sizeof(Shared) + sizeof(int2) * kMostExperts <= 227 << 10);
  static int64_t shared_bytes(int64_t E) { return sizeof(Shared) + sizeof(int2) * E; }

  Shared& shared;
  const Problem& problem;
  const GemmParams& p;

  __device__ __forceinline__ int team() const { return T::kTeam == 1 ? 1 : problem.team; }
  __device__ __forceinline__ int rank() const { return blockIdx.x % team(); }  // of this CTA there

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

  __device__ __forceinline__ Item item(int index) const {
    const int E = static_cast<int>(p.E);
    int low = 0, high = E;  // the last expert that begins at or before this item
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (shared.first[middle].x * problem.row_tiles <= index ? low : high) = middle;
    }
    const int2 first = shared.first[low], next = shared.first[low + 1];
    const int local = index - first.x * problem.row_tiles, tiles = next.x - first.x;
    const int rows = next.y - first.y;
    int row_tile = local, begin = 0, each = rows;
    if (tiles > 1) {  // seldom while decoding, which has no time for divisions
      const int even = ((rows + tiles - 1) / tiles + 7) / 8 * 8;
      each = even > T::kTokens - T::kStep ? T::kTokens : even;  // even shares where all are narrower
      begin = local % tiles * each, row_tile = local / tiles;
    }
    return {low, row_tile * team() + rank(), first.y + begin, min(each, rows - begin)};
  }

  // What this CTA computes, or its team. Items that do not fill the last wave are shared out in steps of K:
  // what is left after the whole waves but one is cut into equal runs of stages, so a CTA's run may end
  // inside an item (a head) and the next CTA's begins there (its rest). A CTA computes its head first and
  // leaves the accumulators in memory, and takes over its neighbour's last of all, when that one is long
  // there, or soon (CTAs come up in ascending order): no K chain is broken.
  struct Share {
    int first, stride, waves;  // items first, first + stride, .. are whole, and those
    int begin, end;            // of [begin, end) but for
    int rest, head;            // the stages before `rest` of `begin`; and `head` stages of `end`
  };
  __device__ __forceinline__ Share share() const {
    const int items = shared.first[p.E].x * problem.row_tiles, teams = problem.by_teams.divisor;
    const int me = blockIdx.x / team(), stages = problem.by_stages.divisor;
    Share s{me, teams};
    int left;
    problem.by_teams(s.waves, left, items);
    if (s.waves > 0 && left > 0) {
      const int first = --s.waves * teams, run = (teams + left) * stages;
      problem.by_stages(s.begin, s.rest, problem.by_teams.div(me * run));
      problem.by_stages(s.end, s.head, problem.by_teams.div((me + 1) * run));
      s.begin += first, s.end += first;
    } else if (s.waves == 0 && me < items) {
      s.begin = me, s.end = me + 1;
    }
    return s;
  }

  __device__ __forceinline__ bool part(const Share& s, int n, Part& part) const {  // the n-th
    if (s.head > 0 && n-- == 0) {
      part = {s.end, 0, s.head * kStageSteps};
      return true;
    }
    if (n < s.waves) {
      part = {s.first + n * s.stride, 0, problem.steps};
      return true;
    }
    n += s.begin + (s.rest > 0) - s.waves;
    if (n < s.end) {
      part = {n, 0, problem.steps};
      return true;
    }
    part = {s.begin, s.rest * kStageSteps, problem.steps};
    return s.rest > 0 && n == s.end;
  }

  // First weight row, within the expert, of the tile's low (0) or high (1) half.
  __device__ __forceinline__ int half_row(const Item& item, int half) const {
    return item.row_tile * problem.tile_step + half * problem.half_step;
  }

  // The row of `a` that row r of the product reads.
  __device__ __forceinline__ int source_row(int r) const {
    if (!p.rows) return r;
    return min(max(p.rows[r], 0), static_cast<int>(p.a_rows) - 1);
  }

  // ---- producers -----------------------------------------------------------------------------------

  __device__ __forceinline__ void load_weights(const CUtensorMap* map) const {
    int stage = 0;
    uint32_t parity = 1;
    const Share all = share();
    Part own;
    int n = 0;
    for (; part(all, n, own); ++n) {
      const Item it = item(own.index);
      const typename Weights::Source from(problem, map, it.expert, {half_row(it, 0), half_row(it, 1)});
      for (int step = own.begin; step < own.end; step += kStageSteps) {
        barrier_sleep(&shared.weights_free[stage], parity);
        if (step == own.begin) shared.work[n % (T::kWeightStages + 1)] = {it, own};
        from.bring(shared.weights[stage], step, &shared.weights_full[stage]);
        if (++stage == T::kWeightStages) stage = 0, parity ^= 1;
      }
    }
    barrier_sleep(&shared.weights_free[stage], parity);
    shared.work[n % (T::kWeightStages + 1)].item.count = 0;  // that was all
    barrier_arrive(&shared.weights_full[stage]);
  }

  // Rows past the tile's own come along: their columns of the product are not stored.
  __device__ __forceinline__ void load_tokens(const CUtensorMap* map) const {
    uint64_t* const full = T::kNarrow ? shared.weights_full : shared.tokens_full;
    uint64_t* const free = T::kNarrow ? shared.weights_free : shared.tokens_free;
    int stage = 0;
    uint32_t parity = 1;
    const Share all = share();
    Part own;
    for (int n = 0; part(all, n, own); ++n) {
      const Item it = item(own.index);
      const int end = (own.end + T::kRound - 1) / T::kRound * T::kRound;
      for (int step = own.begin; step < end; step += T::kSlabs) {
        barrier_sleep(&free[stage], parity);
        barrier_expect(&full[stage], T::kSlabs * T::kSlabBytes);
#pragma unroll
        for (int slab = 0; slab < T::kSlabs; ++slab)
          copy_tokens(stage, slab, map, (step + slab) * 64, it.first_row, &full[stage]);
        if (++stage == T::kTokenStages) stage = 0, parity ^= 1;
      }
    }
    if constexpr (T::kNarrow) {  // that was all
      barrier_sleep(&free[stage], parity);
      barrier_arrive(&full[stage]);
    }
  }

  // A CTA of a team brings its share of the tokens, to all.
  __device__ __forceinline__ void copy_tokens(int stage, int slab, const CUtensorMap* map, int k, int row,
                                              uint64_t* full) const {
    uint8_t* to = shared.tokens[stage] + slab * T::kSlabBytes;
    if (team() == 1) return copy_box(to, map, k, row, full);
    copy_box_to_both(to + rank() * (T::kSlabBytes / 2), map, k, row + rank() * (T::kTokens / 2), full);
  }

  // ---- consumers -----------------------------------------------------------------------------------

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
    int weights = 0, tokens = 0;  // stages
    uint32_t weights_parity = 0, tokens_parity = 0;
  };

  using Operands = decltype(cute::make_tensor<bf>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<4 * T::kGroup>>{}));

  __device__ __forceinline__ void release_tokens(int& held) const {
    if (held < 0) return;
    const uint32_t lane = threadIdx.x % 32;
    if (T::kTeam == 1 && lane == 0) barrier_arrive(&shared.tokens_free[held]);
    if (T::kTeam > 1 && lane < team()) barrier_arrive_at(&shared.tokens_free[held], lane);
    held = -1;
  }

  __device__ __forceinline__ void release_weights(Pipe& pipe) const {
    __syncwarp();  // the arrival speaks for loads of all lanes
    if (threadIdx.x % 32 < kArrivals) barrier_arrive(&shared.weights_free[pipe.weights]);
    if (++pipe.weights == T::kWeightStages) pipe.weights = 0, pipe.weights_parity ^= 1;
  }

  // A warpgroup decodes kGroup steps of K, then gives its tensor core all their products at once, and decodes
  // into the other buffer meanwhile.
  template <int N>
  __device__ __forceinline__ void multiply_part(Pipe& pipe, const Part& own,
                                                const typename Weights::Places& at,
                                                Accumulator<N> (&acc)[T::kUnits],
                                                uint32_t (&worst)[T::kUnits]) const {
    using namespace cute;
    const Mma<N> tiled;
    const auto b = token_slabs<N>();
    Operands operands[T::kBuffers];
    constexpr int kUnits = T::kUnits, kGroup = T::kGroup, kRound = T::kRound, kRawSteps = Weights::kRawSteps;
    const int end = own.end;  // in a register: barriers would have it read from shared memory again
    int held = -1;            // stage of tokens that products under way still read
    int first_slab = 0;       // of the stage of tokens in use

    for (int step = own.begin; step < end; step += kStageSteps) {
      barrier_wait(&shared.weights_full[pipe.weights], pipe.weights_parity);
      const Base base = Weights::base(at, shared_address(&shared.weights[pipe.weights]));
      typename Weights::Raw raw = Weights::load(at, base, 0, 0);
#pragma unroll
      for (int s = 0; s < kStageSteps; s += kGroup) {
        if (s % kRound == 0 && step + s >= end) break;
        if (s % T::kSlabs == 0) {
          barrier_wait(&shared.tokens_full[pipe.tokens], pipe.tokens_parity);
          first_slab = __shfl_sync(~0u, pipe.tokens, 0) * T::kSlabs;
        }
        const int slab = first_slab + s % T::kSlabs;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          auto& a = operands[(s / kGroup * kUnits + u) % T::kBuffers];
#pragma unroll
          for (int q = 0; q < kGroup; ++q) {
            const typename Weights::Raw now = raw;
            if (q + 1 < kGroup && (q + 1) % kRawSteps == 0) raw = Weights::load(at, base, s + q + 1, u);
            Weights::decode(now, at, (s + q) % kRawSteps, step + s + q, worst[u],
                            *reinterpret_cast<uint32_t (*)[16]>(raw_pointer_cast(a(_, _, 4 * q).data())));
          }
          warpgroup_fence_operand(acc[u]);
          warpgroup_arrive();
#pragma unroll
          for (int k = 0; k < 4 * kGroup; ++k)
            cute::gemm(tiled, a(_, _, k), b(_, _, k % 4, slab + k / 4), acc[u]);
          warpgroup_commit_batch();
          if (u + 1 < kUnits)
            raw = Weights::load(at, base, s, u + 1);
          else if (s + kGroup < kStageSteps && (s + kGroup) % kRawSteps == 0)
            raw = Weights::load(at, base, s + kGroup, 0);
          warpgroup_wait<1>();
          release_tokens(held);
        }
        if (s % T::kSlabs == T::kSlabs - kGroup) held = next_tokens(pipe);
      }
      release_weights(pipe);
    }
    warpgroup_wait<0>();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) warpgroup_fence_operand(acc[u]);
    constexpr int kLast = T::kSlabs - kRound;
    if (end % T::kSlabs > 0 && end % T::kSlabs <= kLast)  // the last tokens were not used up
      held = next_tokens(pipe);
    release_tokens(held);
  }

  __device__ __forceinline__ int next_tokens(Pipe& pipe) const {
    const int used = pipe.tokens;
    if (++pipe.tokens == T::kTokenStages) pipe.tokens = 0, pipe.tokens_parity ^= 1;
    return used;
  }

  template <int N>
  __device__ __forceinline__ void compute(Pipe& pipe, const Work& work) const;
  __device__ __forceinline__ void consume() const;
};

}  // namespace nvfp4::sm90
