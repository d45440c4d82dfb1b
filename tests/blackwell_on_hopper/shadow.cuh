// The shadow executor as a kernel, to stand in the place of any tile.
#pragma once
#include "../../csrc/kernels/blackwell/launch.h"
#include "../../csrc/kernels/blackwell/shadow.h"
#include "../../csrc/kernels/cuda/device.h"

namespace nvfp4::blackwell {

static __global__ void shadow(Groups g, Epilogue epilogue, int64_t E) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  for (int64_t e = 0; e < E; ++e) {
    const int N = cute::get<0>(g.shape[e]);
    const int64_t values = static_cast<int64_t>(N) * cute::get<1>(g.shape[e]);
    for (int64_t i = thread; i < values; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
      shadow_value(g, epilogue, e, static_cast<int>(i % N), static_cast<int>(i / N));
  }
}

static int64_t no_workspace(const Launch&) { return 0; }
static void run(const Launch& l, cudaStream_t stream) {
  shadow<<<264, 256, 0, stream>>>(l.groups, l.epilogue, l.E);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace nvfp4::blackwell
