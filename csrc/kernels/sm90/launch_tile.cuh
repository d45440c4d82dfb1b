#pragma once
#include "kernel.cuh"
#include "launch.h"

namespace nvfp4::sm90 {

template <class T, template <class> class Weights>
void launch_kernel(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                   cudaStream_t stream) {
  using Kernel = Kernel<T, Weights>;
  const auto kernel = grouped_kernel<T, Weights>;
  const auto most = static_cast<int>(Kernel::shared_bytes(kMostExperts));  // whatever E: threads share it
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  const auto ctas = static_cast<unsigned>(cuda::sm_count());
  launch_after(kernel, ctas, T::kThreads, Kernel::shared_bytes(problem.p.E), stream,
               static_cast<unsigned>(problem.team), problem, weights, tokens);
}

template <class T>
void launch_tile(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                 cudaStream_t stream) {
  (problem.p.b_packed ? launch_kernel<T, PackedWeights> : launch_kernel<T, PlainWeights>)(problem, weights,
                                                                                          tokens, stream);
}

}  // namespace nvfp4::sm90
