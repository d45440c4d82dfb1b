// kSms SMs work on one tile of 128 kSms rows of weights x kTokens tokens, 256 values of K a stage. A cluster
// of kCluster SMs has its tiles one below the other: their tokens are the same and are loaded once, for all.
#pragma once
#include "../blackwell/tile.cuh"
#include "tiles.h"

namespace nvfp4::blackwell {

template <int kTokens, int kSms, int kCluster>
struct Sm100 {
  static constexpr bool kPair = kSms == 2;
  using Arch = cutlass::arch::Sm100;
  using Mma = cute::Shape<cute::Int<128 * kSms>, cute::Int<kTokens>, cute::_256>;
  using Cluster = cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>;
  using MainSchedule = cute::conditional_t<kPair, cutlass::gemm::KernelPtrArrayTmaWarpSpecialized2SmNvf4Sm100,
                                           cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100>;
  using EndSchedule = cute::conditional_t<kPair, cutlass::epilogue::PtrArrayTmaWarpSpecialized2Sm,
                                          cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm>;
};

template <int kTokens, int kSms, int kCluster = kSms>
Kernel cutlass_kernel() {
  using Made = Cutlass<Sm100<kTokens, kSms, kCluster>>;
  return {Made::workspace, Made::run};
}

}  // namespace nvfp4::blackwell
