#pragma once
#include "kernel.cuh"
#include "launch.h"
#include "pair.cuh"

namespace nvfp4::sm90 {

// A CTA a multiprocessor, for what `problem` is part of.
template <class Kernel, class... Params>
void launch_ctas(void (*kernel)(Params...), const Problem& problem, cudaStream_t stream,
                 const std::type_identity_t<Params>&... params) {
  const auto most = static_cast<int>(Kernel::shared_bytes(kMostExperts));  // whatever E: threads share it
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  launch_after(kernel, static_cast<unsigned>(cuda::sm_count()), Kernel::Tile::kThreads,
               Kernel::shared_bytes(problem.p.E), stream, static_cast<unsigned>(problem.team), params...);
}

template <class T>
void launch_tile(const Product& product, cudaStream_t stream) {
  const Problem& problem = product.problem;
  if (problem.p.b_packed)
    launch_ctas<Kernel<T, PackedWeights>>(grouped_kernel<T, PackedWeights>, problem, stream, product);
  else
    launch_ctas<Kernel<T, PlainWeights>>(grouped_kernel<T, PlainWeights>, problem, stream, product);
}

template <class T>
void launch_pair(const Pair& pair, uint32_t* taken, cudaStream_t stream) {
  const Problem& problem = pair.product[0].problem;
  if (problem.p.b_packed)
    launch_ctas<Kernel<T, PackedWeights, true>>(pair_kernel<T, PackedWeights>, problem, stream, pair, taken);
  else
    launch_ctas<Kernel<T, PlainWeights, true>>(pair_kernel<T, PlainWeights>, problem, stream, pair, taken);
}

}  // namespace nvfp4::sm90
