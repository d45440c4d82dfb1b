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
#include "work.cuh"

namespace nvfp4::sm90 {

struct Ring {  // where a producer is
  int stage = 0, parts = 0;
  uint32_t parity = 1;
};

struct Mailbox {  // which share comes next, from the thread that takes them (pair.cuh)
  int share;
  uint64_t full, free;
};

template <class T, template <class> class Weights_, bool kOfPair = false>  // of two products in one launch
struct Kernel : Plan<T, kOfPair> {
  using Plan = sm90::Plan<T, kOfPair>;
  using Plan::problem, Plan::p, Plan::team, Plan::rank, Plan::item, Plan::part, Plan::half_row, Plan::second;
  using typename Plan::Share;
  using Tile = T;
  using Weights = Weights_<T>;
  using bf = cute::bfloat16_t;

  struct Shared {
    alignas(1024) typename Weights::Stage weights[T::kWeightStages];
    alignas(1024) uint8_t tokens[T::kTokenStages][T::kSlabs * T::kSlabBytes];
    float factors[T::kNarrow ? 1 : T::kRows][2];  // alpha and bias, by warps
    alignas(16) uint8_t out[T::kNarrow ? 1 : T::kWarpgroups][2 * T::kUnits][T::kPlaneBytes];
    uint64_t weights_full[T::kWeightStages], weights_free[T::kWeightStages];
    uint64_t tokens_full[T::kTokenStages], tokens_free[T::kTokenStages];
    Work work[T::kWeightStages + 1];  // in turn: the producer is no more items ahead than it has stages
    int left[T::kConsumers / 32];     // parts whose results a warp has left in memory (carry.cuh)
    Mailbox mailbox;                  // of kernels that compute two products
    int2 first[1];                    // [E + 1] (work.cuh)
  };
  static_assert(sizeof(Shared) + sizeof(int2) * kMostExperts <= 227 << 10);
  static int64_t shared_bytes(int64_t E) { return sizeof(Shared) + sizeof(int2) * E; }

  Shared& shared;

  __device__ __forceinline__ Kernel(Shared& shared, const Problem& problem)
      : Plan{problem, problem.p, shared.first}, shared(shared) {}

  // The row of `a` that row r of the product reads.
  __device__ __forceinline__ int source_row(int r) const {
    if (!p.rows) return r;
    return min(max(p.rows[r], 0), static_cast<int>(p.a_rows) - 1);
  }

  __device__ __forceinline__ float scale_of(int r) const {  // of its activations; there are some
    return p.a_scale[p.a_scale_per_row ? source_row(r) : 0];
  }

  // ---- producers -----------------------------------------------------------------------------------

  __device__ __forceinline__ void load_weights(const CUtensorMap* map, const Share& all, Ring& ring) const {
    Part own;
    for (int n = 0; part(all, n, own); ++n, ++ring.parts) {
      const Item it = item(own.index);
      const typename Weights::Source from(problem, map, it.expert, {half_row(it, 0), half_row(it, 1)});
      for (int step = own.begin; step < own.end; step += kStageSteps) {
        barrier_sleep(&shared.weights_free[ring.stage], ring.parity);
        if (step == own.begin) shared.work[ring.parts % (T::kWeightStages + 1)] = {it, own};
        from.bring(shared.weights[ring.stage], step, &shared.weights_full[ring.stage]);
        if (++ring.stage == T::kWeightStages) ring.stage = 0, ring.parity ^= 1;
      }
    }
  }
  __device__ __forceinline__ void end_weights(const Ring& ring) const {
    barrier_sleep(&shared.weights_free[ring.stage], ring.parity);
    shared.work[ring.parts % (T::kWeightStages + 1)].item.count = 0;  // that was all
    barrier_arrive(&shared.weights_full[ring.stage]);
  }

  // Rows past the tile's own come along: their columns of the product are not stored.
  __device__ __forceinline__ void load_tokens(const CUtensorMap* map, const Share& all, Ring& ring) const {
    uint64_t* const full = T::kNarrow ? shared.weights_full : shared.tokens_full;
    uint64_t* const free = T::kNarrow ? shared.weights_free : shared.tokens_free;
    int there = -1;  // tile of tokens
    Part own;
    for (int n = 0; part(all, n, own); ++n) {
      const Item it = item(own.index);
      if (second() && it.tokens != there) await_tokens(there = it.tokens);
      const int end = (own.end + T::kRound - 1) / T::kRound * T::kRound;
      for (int step = own.begin; step < end; step += T::kSlabs) {
        barrier_sleep(&free[ring.stage], ring.parity);
        barrier_expect(&full[ring.stage], T::kSlabs * T::kSlabBytes);
#pragma unroll
        for (int slab = 0; slab < T::kSlabs; ++slab)
          copy_tokens(ring.stage, slab, map, (step + slab) * 64, it.first_row, &full[ring.stage]);
        if (++ring.stage == T::kTokenStages) ring.stage = 0, ring.parity ^= 1;
      }
    }
  }
  __device__ __forceinline__ void end_tokens(const Ring& ring) const {
    if constexpr (!T::kNarrow) return;
    barrier_sleep(&shared.weights_free[ring.stage], ring.parity);
    barrier_arrive(&shared.weights_full[ring.stage]);
  }

  // Until the product before has finished a tile of tokens, in all its rows of weights.
  __device__ __forceinline__ void await_tokens(int tile) const {
    while (count_read(problem.finished + tile) < problem.awaits) __nanosleep(64);
    generic_then_copies();
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

  // What comes n-th; null: no more.
  __device__ __forceinline__ const Work* next_work(const Pipe& pipe, int n) const {
    barrier_wait(&shared.weights_full[pipe.weights], pipe.weights_parity);
    const Work* work = &shared.work[n % (T::kWeightStages + 1)];
    return work->item.count == 0 ? nullptr : work;
  }

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
    if constexpr (T::kNarrow) reads_then_copies();  // wider tiles have decoded what they will use
    __syncwarp();                                   // the arrival speaks for loads of all lanes
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
};

}  // namespace nvfp4::sm90
