// Stands in for csrc/kernels/cuda in a build without nvcc: what a CUDA tensor gets to hear.
#include <stdexcept>

#include "../kernels/cuda/kernels.h"

namespace nvfp4::cuda {

[[noreturn]] static void missing() {
  throw std::runtime_error(
      "nvfp4: this build has no CUDA kernels. Build where nvcc is found, with NVFP4_CHIPS unset or naming "
      "your "
      "chip, or pass CPU tensors.");
}

void tensor_scale(const TensorScaleParams&, cudaStream_t) { missing(); }
void quantize(const QuantizeParams&, cudaStream_t) { missing(); }
void quantize_rows(const QuantizeRowsParams&, cudaStream_t) { missing(); }
void dequantize(const DequantizeParams&, cudaStream_t) { missing(); }
void remap_sf(const RemapParams&, cudaStream_t) { missing(); }
void unmap_sf(const RemapParams&, cudaStream_t) { missing(); }
void pack_sm90(const PackParams&, cudaStream_t) { missing(); }
void unpack_sm90(const UnpackParams&, cudaStream_t) { missing(); }
int64_t mxfp4_workspace(const Mxfp4Params&) { missing(); }
void mxfp4_to_nvfp4(const Mxfp4Params&, void*, cudaStream_t) { missing(); }
void grouped_gemm(const GemmParams&, cudaStream_t) { missing(); }
std::string gemm_plan(int64_t, int64_t, int64_t, int64_t, bool) { missing(); }
int capability() { return 0; }
void route(const RouteParams&, cudaStream_t) { missing(); }
int64_t permute_workspace(const PermuteParams&) { missing(); }
void permute(const PermuteParams&, void*, cudaStream_t) { missing(); }
void swiglu(const SwigluParams&, cudaStream_t) { missing(); }
void swiglu_quantize(const SwigluQuantizeParams&, cudaStream_t) { missing(); }
void combine(const CombineParams&, cudaStream_t) { missing(); }

}  // namespace nvfp4::cuda
