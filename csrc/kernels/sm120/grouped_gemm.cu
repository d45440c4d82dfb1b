// The grouped GEMM of sm_120a and sm_121a (RTX 50, RTX PRO, DGX Spark): no tensor memory, mma.sync with block
// scales.
#include "../blackwell/grouped_gemm.cuh"
#include "../blackwell/kernels.h"
#include "tiles.h"

namespace nvfp4::blackwell {

static const Kernel kernels[] = {kernel<32>(), kernel<64>(), kernel<128>()};
static_assert(std::size(kernels) == std::size(kTileTokens));

bool takes(const GemmParams& p) { return has_block_scaled_operands(p); }

int64_t workspace(const GemmParams& p) { return carve(p, nullptr, kernels).bytes; }

void grouped_gemm_with(int tile, const GemmParams& p, void* workspace, cudaStream_t stream) {
  set_up_and_run(p, workspace, kernels, tile, stream);
}

void grouped_gemm(const GemmParams& p, void* workspace, cudaStream_t stream) {
  grouped_gemm_with(choose_tile(p.R, p.E), p, workspace, stream);
}

std::string gemm_plan(int64_t R, int64_t, int64_t, int64_t E, bool) {
  return "sm120 mma.sync mxf4nvf4, tile 128x" + std::to_string(kTileTokens[choose_tile(R, E)]) +
         " (weights x tokens), the smallest that holds an expert's rows; never run on the chip";
}

}  // namespace nvfp4::blackwell
