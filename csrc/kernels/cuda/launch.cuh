// Launches of small kernels that follow one another.
#pragma once
#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace nvfp4::cuda {

// Programmatic dependent launch: CTAs come up while the kernel before still runs, and wait in start() until
// its results are visible. A launch of at most one CTA an SM gains 0.5 of its 1.8 us so; with many short CTAs
// the wait itself costs more (25 % of relu2 at 65536 x 2048), so larger launches go without. Measured on an
// H200.
struct Grid {
  int64_t ctas;
  dim3 threads;
  int64_t shared_bytes = 0;
};

template <class... Params>
void launch(void (*kernel)(bool early, Params...), const Grid& grid, cudaStream_t stream,
            std::type_identity_t<Params>... params) {
  if (grid.ctas == 0) return;
  const bool early = grid.ctas <= sm_count() && capability() >= 90;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.ctas));
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, early, params...));
}

// What a launched kernel does before it touches memory. Inputs are read by plain loads: the read-only path
// (__ldg) may serve what was there before the wait. `kFirst`: who comes up early then finds all done that
// came before this kernel.
template <bool kFirst = false>
__device__ void start([[maybe_unused]] bool early) {
#if __CUDA_ARCH__ >= 900
  if (!early) return;
  if (!kFirst) cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  if (kFirst) cudaTriggerProgrammaticLaunchCompletion();
#endif
}

}  // namespace nvfp4::cuda
