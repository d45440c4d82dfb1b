#pragma once
#include "epilogue.cuh"
#include "launch.h"

namespace nvfp4::sm90 {

template <class T, template <class> class Weights>
void launch_kernel(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                   cudaStream_t stream) {
  const int64_t bytes = Kernel<T, Weights>::shared_bytes(problem.p.E);
  const auto kernel = grouped_kernel<T, Weights>;
  CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const auto ctas = static_cast<unsigned>(cuda::sm_count());
  launch_after(kernel, ctas, T::kThreads, bytes, stream, static_cast<unsigned>(problem.team), problem,
               weights, tokens);
}

template <class T>
void launch_tile(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                 cudaStream_t stream) {
  (problem.p.b_packed ? launch_kernel<T, PackedWeights> : launch_kernel<T, PlainWeights>)(problem, weights,
                                                                                          tokens, stream);
}

}  // namespace nvfp4::sm90
