// The runtime's fault, and what launches need to know of the device.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

// Becomes a RuntimeError. torch's own check macro needs libtorch_cuda, which a CPU-only torch lacks.
#define CUDA_CHECK(call)                                                                           \
  do {                                                                                             \
    if (const cudaError_t error = (call); error != cudaSuccess)                                    \
      throw std::runtime_error(std::string("nvfp4: ") + #call + ": " + cudaGetErrorString(error)); \
  } while (0)

namespace nvfp4::cuda {

inline int sm_count() {
  int device = 0, count = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace nvfp4::cuda
