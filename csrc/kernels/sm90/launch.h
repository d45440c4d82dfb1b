// What the host side of this chip's files shares.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../cuda/device.h"
#include "../params.h"

namespace nvfp4::sm90 {

struct Product;
struct Pair;

// prepare.cu: the tokens of a product in the kernel's order of K, [R, ordered_width(K)]. `counts`: what the
// product counts in, zero before it comes up.
struct Counts {
  uint32_t* first;
  int number;
};
int64_t ordered_width(int64_t K);
void order_tokens(const GemmParams& p, Counts counts, bf16* out, cudaStream_t stream);
// The same, quantized before row by row; `scale`: of rows of `a`.
void quantize_tokens(const GemmParams& p, float* scale, bf16* out, cudaStream_t stream);

// One instantiation a file: gemm_<tokens>.cu, pair_<tokens>.cu.
using TileLauncher = void(const Product&, cudaStream_t);
TileLauncher launch_8s, launch_8, launch_16, launch_24, launch_32, launch_48, launch_64, launch_128,
    launch_256;
using PairLauncher = void(const Pair&, uint32_t* taken, cudaStream_t);
PairLauncher launch_pair_8s, launch_pair_8;

// A kernel that comes up while the one before it on the stream still runs, and waits for it by follow().
template <class... Params>
void launch_after(void (*kernel)(Params...), unsigned ctas, dim3 threads, int64_t shared_bytes,
                  cudaStream_t stream, unsigned cluster, const std::type_identity_t<Params>&... params) {
  if (ctas == 0) return;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas / cluster * cluster);
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params...));
}

}  // namespace nvfp4::sm90
