// CUTLASS's grouped block-scaled kernel; instantiated by the chips' tile_*.cu files, one tile each.
#pragma once
#pragma nv_diag_suppress 2908  // CUTLASS captures `this` by copy, ten lines of warning each
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../cuda/device.h"
#include "epilogue.cuh"
#include "launch.h"

namespace nvfp4::blackwell {

// What the chips differ in: `Chip` has Arch, Mma (the tile: weights x tokens x K of a stage), Cluster and the
// two schedules.
template <class Chip>
struct Cutlass {
  using Operand = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  using Arch = typename Chip::Arch;
  using Class = cutlass::arch::OpClassBlockScaledTensorOp;
  using D = cutlass::layout::ColumnMajor*;
  static constexpr int kAlign = 32, kAlignD = 8;  // 16 bytes, what the copy engine wants of a row
  static constexpr unsigned kCluster = cute::size(typename Chip::Cluster{});

  using End = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, Class, typename Chip::Mma, typename Chip::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, D, kAlignD, cutlass::bfloat16_t, D,
      kAlignD, typename Chip::EndSchedule, EpilogueNode>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, Class, Operand, cutlass::layout::RowMajor*, kAlign, Operand, cutlass::layout::ColumnMajor*,
      kAlign, float, typename Chip::Mma, typename Chip::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename End::SharedStorage))>,
      typename Chip::MainSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>, Main, End>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static_assert(std::is_same_v<KMajor, typename Kernel::InternalStrideA>);
  static_assert(std::is_same_v<KMajor, typename Kernel::InternalStrideB>);
  static_assert(std::is_same_v<ColumnMajor, typename Kernel::InternalStrideD>);
  static_assert(std::is_same_v<SfBlocks, typename Main::InternalLayoutSFA>);
  static_assert(std::is_same_v<SfBlocks, typename Main::InternalLayoutSFB>);

  static typename Gemm::Arguments arguments(const Launch& l) {
    const Groups& g = l.groups;
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {static_cast<int>(l.E), g.shape, nullptr};
    using Codes = typename Main::ArrayElementA;
    using Scales = typename Main::ElementSF;
    args.mainloop.ptr_A = reinterpret_cast<const Codes**>(g.weights);
    args.mainloop.dA = g.weights_stride;
    args.mainloop.ptr_B = reinterpret_cast<const Codes**>(g.tokens);
    args.mainloop.dB = g.tokens_stride;
    args.mainloop.ptr_SFA = reinterpret_cast<const Scales**>(g.weights_sf);
    args.mainloop.layout_SFA = g.weights_blocks;
    args.mainloop.ptr_SFB = reinterpret_cast<const Scales**>(g.tokens_sf);
    args.mainloop.layout_SFB = g.tokens_blocks;
    args.epilogue.thread = l.epilogue;
    args.epilogue.ptr_D = reinterpret_cast<cutlass::bfloat16_t**>(g.out);
    args.epilogue.dD = g.out_stride;
    args.hw_info.sm_count = l.sms;
    return args;
  }

  static int64_t workspace(const Launch& l) {
    return static_cast<int64_t>(Gemm::get_workspace_size(arguments(l)));
  }

  // That run at once: the SMs of a cluster lie in one GPC, and a grid of more clusters than find room would
  // take another whole round for the last of them. Of the first device; wrong elsewhere, it costs time only.
  static int resident_clusters() {
    static const int most = [] {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {kCluster, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(kCluster);
      config.blockDim = Kernel::get_block_shape();
      config.dynamicSmemBytes = Kernel::SharedStorageSize;
      config.attrs = &cluster, config.numAttrs = 1;
      const auto* kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
      CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Kernel::SharedStorageSize));
      int found = 0;
      CUDA_CHECK(cudaOccupancyMaxActiveClusters(&found, kernel, &config));
      return found;
    }();
    return most;
  }

  static void run(const Launch& l, cudaStream_t stream) {
    Gemm gemm;
    auto args = arguments(l);
    args.hw_info.max_active_clusters = resident_clusters();
    cutlass::Status status = gemm.initialize(args, l.workspace, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status != cutlass::Status::kSuccess)
      throw std::runtime_error(std::string("nvfp4: grouped_gemm on Blackwell: CUTLASS says ") +
                               cutlassGetStatusString(status) + ", CUDA says " +
                               cudaGetErrorString(cudaGetLastError()));
  }
};

}  // namespace nvfp4::blackwell
