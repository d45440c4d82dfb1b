#include "../blackwell/kernels.h"
#include "../chip.h"

namespace nvfp4::blackwell {

static const Chip chip = {"sm120", 12, takes, workspace, grouped_gemm, gemm_plan};
[[maybe_unused]] static const bool registered = (nvfp4_register_chip(&chip), true);

}  // namespace nvfp4::blackwell
