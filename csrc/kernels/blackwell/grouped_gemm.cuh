// The grouped GEMM around a kernel: what it takes, its workspace, set-up and launch. No host sync, no
// allocation.
#pragma once
#include <algorithm>
#include <span>

#include "launch.h"
#include "set_up.cuh"

namespace nvfp4::blackwell {

// Packed activations, rows gathered, nothing fused, everything where the copy engine can read it.
inline bool has_block_scaled_operands(const GemmParams& p) {
  const auto at16 = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  return !p.a && !p.rows && !p.activated && !p.b_packed && !p.a_in_k_order && !p.out_in_k_order &&
         p.N % 8 == 0 && p.K % 32 == 0 && at16(p.a_packed) && at16(p.b) && at16(p.b_sf);
}

// What the workspace holds, one behind the other.
struct Parts {
  Launch launch;
  uint8_t* spread;  // SfGroups of linear scales, or null
  int64_t bytes;
};
// Room for any of the kernels.
inline Parts carve(const GemmParams& p, void* workspace, std::span<const Kernel> kernels) {
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
  for (const Kernel& kernel : kernels) most = std::max(most, kernel.workspace(parts.launch));
  parts.bytes = used + most;
  return parts;
}

inline void set_up_and_run(const GemmParams& p, void* workspace, std::span<const Kernel> kernels, int which,
                           cudaStream_t stream) {
  if (p.R == 0 || p.N == 0) return;
  const Parts parts = carve(p, workspace, kernels);
  launch_set_up(p, parts.launch.groups, parts.spread, stream);
  if (p.E > 0) kernels[which].run(parts.launch, stream);
}

}  // namespace nvfp4::blackwell
