// The grouped GEMM of sm_100a and sm_103a: the tile that the model picks.
#include "../blackwell/grouped_gemm.cuh"
#include "../blackwell/kernels.h"
#include "tiles.h"

namespace nvfp4::blackwell {

static const Kernel kernels[] = {kernel<64, 1>(), kernel<128, 1>(), kernel<256, 1>(), kernel<256, 2>(),
                                 kernel<256, 2, 4>()};
static_assert(std::size(kernels) == std::size(kTiles));

bool takes(const GemmParams& p) { return has_block_scaled_operands(p); }

int64_t workspace(const GemmParams& p) { return carve(p, nullptr, kernels).bytes; }

void grouped_gemm_with(int tile, const GemmParams& p, void* workspace, cudaStream_t stream) {
  set_up_and_run(p, workspace, kernels, tile, stream);
}

void grouped_gemm(const GemmParams& p, void* workspace, cudaStream_t stream) {
  grouped_gemm_with(choose(p.R, p.N, p.K, p.E), p, workspace, stream);
}

std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool) { return describe(R, N, K, E); }

}  // namespace nvfp4::blackwell
