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
  const int64_t words = grid.shared_bytes / 4, slack = 1024;  // for what a mistake writes beyond
  static std::vector<uint4> memory;
  memory.resize((words + 2 * slack) / 4 + 1);
  simt::dynamic = memory.data() + slack / 4;
  std::fill_n(reinterpret_cast<int*>(memory.data()), 4 * memory.size(), 3);  // as nobody has cleared it
  simt::launch(static_cast<unsigned>(grid.ctas), grid.threads.x, kernel, true, params...);
}

template <bool kFirst = false>
void start(bool) {}

}  // namespace nvfp4::cuda

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
