#pragma once
#include "epilogue.cuh"
#include "launch.h"

namespace nvfp4::sm90 {

template <class T>
void launch_tile(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                 cudaStream_t stream) {
  const int64_t bytes = T::shared_bytes(problem.p.E);
  CUDA_CHECK(cudaFuncSetAttribute(grouped_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)));
  const auto ctas = static_cast<unsigned>(cuda::sm_count() * T::kCtas);
  launch_after(grouped_kernel<T>, ctas, T::kThreads, bytes, stream, problem, weights, tokens);
}

}  // namespace nvfp4::sm90
