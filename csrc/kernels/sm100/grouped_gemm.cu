// The grouped GEMM of sm_100a and sm_103a: set-up, then the tile that the model picks. No host sync, no
// allocation.
#include "../blackwell/set_up.cuh"
#include "kernels.h"
#include "tiles.h"

namespace nvfp4::blackwell {
namespace {

Kernel kernel_of(int tile) {
  static const Kernel kernels[] = {kernel<64, 1>(), kernel<128, 1>(), kernel<256, 1>(), kernel<256, 2>()};
  static_assert(std::size(kernels) == std::size(kTiles));
  return kernels[tile];
}

// What the workspace holds, one behind the other.
struct Parts {
  Launch launch;
  uint8_t* spread;  // SfGroups of linear scales, or null
  int64_t bytes;
};
Parts carve(const GemmParams& p, void* workspace) {
  const auto rounded = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
  auto* base = static_cast<uint8_t*>(workspace);
  Parts parts{};
  int64_t used = rounded(Groups::carve(base, p.E, parts.launch.groups));
  if (!p.a_sf_grouped) {
    parts.spread = base + used;
    used += rounded(SfGroups::cosize(p.R, p.E, p.K / kBlock));
  }
  parts.launch.epilogue = Epilogue::of(p, parts.launch.groups);
  parts.launch.E = p.E;
  parts.launch.sms = cuda::sm_count();
  parts.launch.workspace = base + used;
  int64_t most = 0;
  for (int tile = 0; tile < static_cast<int>(std::size(kTiles)); ++tile)
    most = std::max(most, kernel_of(tile).workspace(parts.launch));
  parts.bytes = used + most;
  return parts;
}

}  // namespace

bool takes(const GemmParams& p) {
  const auto at16 = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  return !p.a && !p.rows && p.N % 8 == 0 && p.K % 32 == 0 && at16(p.a_packed) && at16(p.b) && at16(p.b_sf);
}

int64_t workspace(const GemmParams& p) { return carve(p, nullptr).bytes; }

void grouped_gemm_with(int tile, const GemmParams& p, void* workspace, cudaStream_t stream) {
  if (p.R == 0 || p.N == 0) return;
  const Parts parts = carve(p, workspace);
  launch_set_up(p, parts.launch.groups, parts.spread, stream);
  if (p.E > 0) kernel_of(tile).run(parts.launch, stream);
}

void grouped_gemm(const GemmParams& p, void* workspace, cudaStream_t stream) {
  grouped_gemm_with(choose(p.R, p.N, p.K, p.E), p, workspace, stream);
}

std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool) { return describe(R, N, K, E); }

}  // namespace nvfp4::blackwell
