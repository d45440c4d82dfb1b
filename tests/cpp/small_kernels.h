// In the place of csrc/kernels/cuda/launch.cuh: launches on the CPU (simt.h).
#pragma once
#include <type_traits>

#include "../../csrc/kernels/cuda/kernels.h"
#include "../../csrc/kernels/math.h"
#include "simt.h"

namespace nvfp4::cuda {

inline int multiprocessors = 1;
inline int sm_count() { return multiprocessors; }

struct Grid {
  int64_t ctas;
  dim3 threads;
  int64_t shared_bytes = 0;
};

template <class... Params>
void launch(void (*kernel)(bool early, Params...), const Grid& grid, cudaStream_t,
            std::type_identity_t<Params>... params) {
  simt::dynamic.resize((grid.shared_bytes + 7) / 8);
  int* const words = reinterpret_cast<int*>(simt::dynamic.data());
  std::fill_n(words, 2 * simt::dynamic.size(), 3);  // memory that nobody has cleared
  simt::launch(static_cast<unsigned>(grid.ctas), grid.threads.x, kernel, true, params...);
}

template <bool kFirst = false>
void start(bool) {}

}  // namespace nvfp4::cuda

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
