// The Blackwell library as a chip of compute capability 9.
#include "../../csrc/kernels/blackwell/kernels.h"
#include "../../csrc/kernels/chip.h"

extern "C" {
__attribute__((visibility("default"))) int blackwell_tile = -1;      // of the table; -1: as the model picks
__attribute__((visibility("default"))) int64_t blackwell_calls = 0;  // that came here
}

namespace nvfp4::blackwell {

static void run(const GemmParams& p, void* workspace, cudaStream_t stream) {
  ++blackwell_calls;
  if (blackwell_tile < 0) return grouped_gemm(p, workspace, stream);
  grouped_gemm_with(blackwell_tile, p, workspace, stream);
}
static const Chip chip = {"sm100 on Hopper", 9, takes, workspace, run, gemm_plan};
static const bool registered = (nvfp4_register_chip(&chip), true);

}  // namespace nvfp4::blackwell
