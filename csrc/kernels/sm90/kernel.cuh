// The kernel: barriers, who is producer and who consumer, and an item from its first accumulator to its rows.
#pragma once
#include "carry.cuh"
#include "epilogue.cuh"
#include "narrow.cuh"

namespace nvfp4::sm90 {

template <class T, template <class> class W, bool kOfPair>
template <int N>
__device__ __forceinline__ void Kernel<T, W, kOfPair>::compute(Pipe& pipe, const Work& work) const {
  const auto& [it, own] = work;
  if constexpr (N < T::kTokens)
    if (it.count > N) return compute<N + T::kStep>(pipe, work);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (own.end == problem.steps) Epilogue<Kernel>(*this, it).bring_factors();
  const int rows[] = {half_row(it, 0), half_row(it, 1)};
  const Carried<Kernel> carried(*this, own, group);
  Accumulator<N> acc[T::kUnits];
  uint32_t worst[T::kUnits] = {};
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::clear(acc[u]);
  if (own.begin > 0) carried.take_over(acc, worst);
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::warpgroup_fence_operand(acc[u]);  // or ptxas serialises (C7514)
  multiply_part<N>(pipe, own, Weights::places(problem, rows, group, warp, lane), acc, worst);
  if (own.end == problem.steps) return Epilogue<Kernel>(*this, it).template run<N>(acc, worst);
  carried.leave(acc, worst);
  left(*this, 0);  // a head comes first
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

// A kernel's parameters, a line by each of its warps, as far as they go: where lines are first wanted they
// would be waited for one after the other.
template <class Params>
__device__ __forceinline__ void touch(const Params& params) {
  constexpr int kLine = 64 / sizeof(uint32_t), kLines = sizeof(Params) / 64;
  const int line = static_cast<int>(threadIdx.x / 32);
  if (line < kLines) asm volatile("" ::"r"(reinterpret_cast<const uint32_t*>(&params)[line * kLine]));
}

// Barriers, and what there is to do; the kernel after this one may come up meanwhile. Then all threads have
// to meet, by are_up().
template <class Kernel>
__device__ __forceinline__ void come_up(const Kernel& kernel) {
  using T = typename Kernel::Tile;
  auto& shared = kernel.shared;
  if (threadIdx.x < T::kConsumers / 32) shared.left[threadIdx.x] = 0;
  if (threadIdx.x == T::kThreads - 32) {  // beside the others' make()
    for (int i = 0; i < T::kWeightStages; ++i) {
      barrier_init(&shared.weights_full[i], T::kNarrow ? 2 : 1);  // producers
      barrier_init(&shared.weights_free[i], T::kConsumers / 32 * kArrivals);
    }
    for (int i = 0; i < T::kTokenStages; ++i) {
      barrier_init(&shared.tokens_full[i], 1);
      barrier_init(&shared.tokens_free[i], kernel.team() * T::kConsumers / 32);
    }
    barrier_init(&shared.mailbox.full, 1);
    barrier_init(&shared.mailbox.free, 2);
    barrier_init_done();
  }
  lead();
  kernel.make();
}

template <class T>
__device__ __forceinline__ void are_up() {
  if constexpr (T::kTeam > 1)
    cluster_sync();  // no CTA arrives at a barrier of another before it is there
  else
    __syncthreads();
}

// Offsets and weights are read while the kernel before this one still runs. It is prepare.cu's, which lets
// this one come up only when all before it on the stream is done, or a product right after prepare.cu's
// kernel.
template <class T, template <class> class Weights>
__global__ void __launch_bounds__(T::kThreads, 1) grouped_kernel(const __grid_constant__ Product product) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Kernel = Kernel<T, Weights>;
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const Kernel kernel(shared, product.problem);
  const int warp = threadIdx.x / 32;
  touch(product);
  come_up(kernel);
  are_up<T>();
  if (warp < T::kConsumers / 32) {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    follow();
    if (!kernel.p.leave_tail) zero_tail(kernel);
    typename Kernel::Pipe pipe;
    for (int n = 0; const Work* work = kernel.next_work(pipe, n); ++n) {
      if constexpr (T::kNarrow)
        Narrow<Kernel>(kernel, pipe).compute(*work, n);
      else
        kernel.template compute<T::kLeast>(pipe, *work);
    }
    if constexpr (T::kTeam > 1) cluster_sync();  // no CTA ends before all have arrived at its barriers
    return;
  }
  cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
  Ring ring;
  if (warp == T::kConsumers / 32 && elected()) {
    kernel.load_weights(&product.weights, kernel.share(), ring);
    kernel.end_weights(ring);
  }
  if (warp == T::kConsumers / 32 + 1 && elected()) {
    follow();
    kernel.load_tokens(&product.tokens, kernel.share(), ring);
    kernel.end_tokens(ring);
  }
  if (warp == T::kConsumers / 32 + 2) announce(kernel, kernel.share(), ring.parts);
}

}  // namespace nvfp4::sm90
