// Hopper's driver refuses tensor maps of packed FP4: they become maps of bytes, half as wide. CUTLASS calls
// the driver by name (CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL) and finds this.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                           void* address, const cuuint64_t* extents,
                                           const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                           CUtensorMapFloatOOBfill fill) {
  static const auto driver = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  cuuint64_t wide[5];
  cuuint32_t boxes[5];
  std::copy_n(extents, rank, wide);
  std::copy_n(box, rank, boxes);
  if (type == CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN8B) {
    type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
    wide[0] = std::max<cuuint64_t>(wide[0] / 2, 1);
    boxes[0] /= 2;
  }
  return driver(map, type, rank, address, wide, strides, boxes, steps, interleave, swizzle, promotion, fill);
}
