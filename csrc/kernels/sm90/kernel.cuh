// The kernel: barriers, who is producer and who consumer, and an item from its first accumulator to its rows.
#pragma once
#include "carry.cuh"
#include "epilogue.cuh"
#include "narrow.cuh"

namespace nvfp4::sm90 {

template <class T, template <class> class W>
template <int N>
__device__ __forceinline__ void Kernel<T, W>::compute(Pipe& pipe, const Work& work) const {
  const auto& [it, own] = work;
  if constexpr (N < T::kTokens)
    if (it.count > N) return compute<N + T::kStep>(pipe, work);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (own.end == problem.steps) Epilogue<Kernel>(*this, it).bring_factors();
  const int rows[] = {half_row(it, 0), half_row(it, 1)};
  const Carried<T> carried{problem, group, team()};
  Accumulator<N> acc[T::kUnits];
  uint32_t worst[T::kUnits] = {};
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::clear(acc[u]);
  if (own.begin > 0) carried.take_over(acc, worst);
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::warpgroup_fence_operand(acc[u]);  // or ptxas serialises (C7514)
  multiply_part<N>(pipe, own, Weights::places(problem, rows, group, warp, lane), acc, worst);
  if (own.end < problem.steps) return carried.leave(acc, worst);
  Epilogue<Kernel>(*this, it).template run<N>(acc, worst);
}

template <class T, template <class> class W>
__device__ void Kernel<T, W>::consume() const {
  Pipe pipe;
  for (int n = 0;; n = n == T::kWeightStages ? 0 : n + 1) {
    barrier_wait(&shared.weights_full[pipe.weights], pipe.weights_parity);
    const Work& work = shared.work[n];
    if (work.item.count == 0) return;
    compute<T::kLeast>(pipe, work);
  }
}

// Rows of no expert come back zero.
template <class Kernel>
__device__ void zero_tail(const Kernel& kernel) {
  using T = typename Kernel::Tile;
  const GemmParams& p = kernel.p;
  const int64_t pieces = (kernel.problem.gated ? p.N / 2 : p.N) / 8;
  const int64_t begin = kernel.rows_before(static_cast<int>(p.E)) * pieces, end = p.R * pieces;
  uint4* out = reinterpret_cast<uint4*>(p.out);
  for (int64_t i = begin + blockIdx.x * T::kConsumers + threadIdx.x; i < end; i += gridDim.x * T::kConsumers)
    out[i] = {};
}

// Offsets and weights are read while the kernel before this one still runs. It is prepare.cu's, which lets
// this one come up only when all before it on the stream is done, or a product right after prepare.cu's
// kernel.
template <class T, template <class> class Weights>
__global__ void __launch_bounds__(T::kThreads, 1)
    grouped_kernel(const __grid_constant__ Problem problem, const __grid_constant__ CUtensorMap weights,
                   const __grid_constant__ CUtensorMap tokens) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Kernel = Kernel<T, Weights>;
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const Kernel kernel{shared, problem, problem.p};
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == T::kThreads - 32) {  // beside the others' plan()
    for (int i = 0; i < T::kWeightStages; ++i) {
      barrier_init(&shared.weights_full[i], T::kNarrow ? 2 : 1);  // producers
      barrier_init(&shared.weights_free[i], T::kConsumers / 32 * kArrivals);
    }
    for (int i = 0; i < T::kTokenStages; ++i) {
      barrier_init(&shared.tokens_full[i], 1);
      barrier_init(&shared.tokens_free[i], kernel.team() * T::kConsumers / 32);
    }
    barrier_init_done();
  }
  lead();
  kernel.plan();
  if constexpr (T::kTeam > 1)
    cluster_sync();  // no CTA arrives at a barrier of another before it is there
  else
    __syncthreads();
  if (warp < T::kConsumers / 32) {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    follow();
    if (!problem.p.leave_tail) zero_tail(kernel);
    if constexpr (T::kNarrow)
      Narrow<Kernel>(kernel).consume();
    else
      kernel.consume();
    if constexpr (T::kTeam > 1) cluster_sync();  // no CTA ends before all have arrived at its barriers
    return;
  }
  cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
  if (warp == T::kConsumers / 32 && elected()) kernel.load_weights(&weights);
  if (warp == T::kConsumers / 32 + 1 && elected()) {
    follow();
    kernel.load_tokens(&tokens);
  }
  if (warp == T::kConsumers / 32 + 2 && kernel.share().head > 0) Carried<T>::announce(problem);
}

}  // namespace nvfp4::sm90
