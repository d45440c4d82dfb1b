// torch's thread pool, lent to the CPU kernels.
#include <torch/csrc/stable/ops.h>

#include "../kernels/cpu/kernels.h"

namespace nvfp4::cpu {

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace nvfp4::cpu
