// Accumulators of an item that two CTAs share, and the scales seen, on their way from one to the next.
#pragma once
#include "gemm.cuh"

namespace nvfp4::sm90 {

// The named barrier of all consumers and the warp that announces; 1 + group is a warpgroup's own.
constexpr int kLeft = 5;

template <class T>
struct Carried {
  const Problem& problem;
  int group, team;

  __device__ __forceinline__ uint32_t* values(int cta) const {
    return problem.carried + static_cast<int64_t>(cta) * T::kCarried * T::kConsumers + threadIdx.x;
  }
  __device__ __forceinline__ uint64_t* flag(int cta) const {
    return problem.flags + cta * T::kWarpgroups + group;
  }

  template <class Accumulator>
  __device__ __forceinline__ void leave(const Accumulator (&acc)[T::kUnits],
                                        const uint32_t (&worst)[T::kUnits]) const {
    uint32_t* to = values(blockIdx.x);
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < cute::size(acc[u]); ++i, to += T::kConsumers) *to = __float_as_uint(acc[u](i));
      *to = worst[u], to += T::kConsumers;
    }
    arrive_threads(kLeft, T::kConsumers + 32);
  }

  // By a warp that has nothing else to do: until what was left can be seen takes one to three us.
  __device__ __forceinline__ static void announce(const Problem& problem) {
    sync_threads(kLeft, T::kConsumers + 32);
    const int group = static_cast<int>(threadIdx.x % 32);
    if (group < T::kWarpgroups)
      flag_raise(problem.flags + blockIdx.x * T::kWarpgroups + group, problem.launch);
  }

  // Lowers the flag again: a graph's next replay raises the same one.
  template <class Accumulator>
  __device__ __forceinline__ void take_over(Accumulator (&acc)[T::kUnits],
                                            uint32_t (&worst)[T::kUnits]) const {
    const int before = blockIdx.x - team;
    while (flag_read(flag(before)) != problem.launch) __nanosleep(64);
    const uint32_t* from = values(before);
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < cute::size(acc[u]); ++i, from += T::kConsumers)
        acc[u](i) = __uint_as_float(__ldcg(from));
      worst[u] = __ldcg(from), from += T::kConsumers;
    }
    sync_threads(1 + group, 128);
    if (threadIdx.x % 128 == 0) *flag(before) = 0;
  }
};

}  // namespace nvfp4::sm90
