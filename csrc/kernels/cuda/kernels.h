// CUDA on any chip: every kernel, on the caller's stream, without a host sync or an allocation. Where a
// kernel needs scratch memory the caller brings `workspace` bytes of it; what they hold before does not
// matter.
#pragma once
#include <string>

#include "../params.h"

typedef struct CUstream_st* cudaStream_t;  // as CUDA's headers say, which a build without nvcc lacks

namespace nvfp4::cuda {

void tensor_scale(const TensorScaleParams&, cudaStream_t);
void quantize(const QuantizeParams&, cudaStream_t);
void quantize_rows(const QuantizeRowsParams&, cudaStream_t);
void dequantize(const DequantizeParams&, cudaStream_t);
void remap_sf(const RemapParams&, cudaStream_t);
void unmap_sf(const RemapParams&, cudaStream_t);
void pack_sm90(const PackParams&, cudaStream_t);
void unpack_sm90(const UnpackParams&, cudaStream_t);
int64_t mxfp4_workspace(const Mxfp4Params&);
void mxfp4_to_nvfp4(const Mxfp4Params&, void* workspace, cudaStream_t);

void grouped_gemm(const GemmParams&, cudaStream_t);
std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool packed_a);
int capability();  // of the current device, 90 for 9.0; 0 where there is none

void route(const RouteParams&, cudaStream_t);
constexpr int64_t kPermuteAlone = 2048;  // choices that permute sorts in one CTA, without a workspace
int64_t permute_workspace(const PermuteParams&);
void permute(const PermuteParams&, void* workspace, cudaStream_t);
void swiglu(const SwigluParams&, cudaStream_t);
void swiglu_quantize(const SwigluQuantizeParams&, cudaStream_t);
void combine(const CombineParams&, cudaStream_t);

}  // namespace nvfp4::cuda
