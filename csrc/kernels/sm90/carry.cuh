// What a CTA leaves in memory for others: accumulators of an item that two CTAs share, with the scales seen,
// and tokens of a second product.
#pragma once
#include "gemm.cuh"

namespace nvfp4::sm90 {

template <class Kernel>
struct Carried {
  using T = typename Kernel::Tile;
  const Kernel& kernel;
  int group, cta;  // of the grid, or one's share

  __device__ __forceinline__ Carried(const Kernel& kernel, const Part& part, int group)
      : kernel(kernel), group(group), cta(part.share * kernel.team() + kernel.rank()) {}

  __device__ __forceinline__ uint32_t* values(int cta) const {
    return kernel.problem.carried + static_cast<int64_t>(cta) * T::kCarried * T::kConsumers + threadIdx.x;
  }
  __device__ __forceinline__ uint64_t* flag(int cta) const {
    return kernel.problem.flags + cta * T::kWarpgroups + group;
  }

  __device__ __forceinline__ uint64_t* own_flag() const { return flag(cta); }

  template <class Accumulator>
  __device__ __forceinline__ void leave(const Accumulator (&acc)[T::kUnits],
                                        const uint32_t (&worst)[T::kUnits]) const {
    uint32_t* to = values(cta);
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < cute::size(acc[u]); ++i, to += T::kConsumers) *to = __float_as_uint(acc[u](i));
      *to = worst[u], to += T::kConsumers;
    }
  }

  // Lowers the flag again: a graph's next replay raises the same one.
  template <class Accumulator>
  __device__ __forceinline__ void take_over(Accumulator (&acc)[T::kUnits],
                                            uint32_t (&worst)[T::kUnits]) const {
    const int before = cta - kernel.team();
    while (flag_read(flag(before)) != kernel.problem.launch) __nanosleep(64);
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

// A warp has left the results of the n-th part in memory.
template <class Kernel>
__device__ __forceinline__ void left(const Kernel& kernel, int n) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) tell(&kernel.shared.left[threadIdx.x / 32], n + 1);
}

// Says what the parts of a share have left, by a warp that has nothing else to do: until others can see it
// takes one to three us. `parts`: before this share.
template <class Kernel>
__device__ __forceinline__ void announce(const Kernel& kernel, const typename Kernel::Share& all,
                                         int& parts) {
  using T = typename Kernel::Tile;
  const Problem& problem = kernel.problem;
  const int lane = static_cast<int>(threadIdx.x % 32);
  Part own;
  for (int n = 0; kernel.part(all, n, own); ++n) {
    ++parts;
    const bool ends = own.end == problem.steps;
    if (ends && !kernel.first()) continue;
    const auto missing = [&] { return lane < T::kConsumers / 32 && hear(&kernel.shared.left[lane]) < parts; };
    while (__any_sync(~0u, missing())) __nanosleep(64);
    __syncwarp();
    if (!ends && lane < T::kWarpgroups)
      flag_raise(Carried<Kernel>(kernel, own, lane).own_flag(), problem.launch);
    if (ends && lane == 0) count_raise(problem.finished + kernel.item(own.index).tokens);
  }
}

}  // namespace nvfp4::sm90
