// The CPU backend: every kernel, and the two things it takes from its surroundings.
#pragma once
#include <functional>
#include <string>

#include "../params.h"

// Hot loops are compiled for three generations of x86-64 and picked at load time; elsewhere once.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NVFP4_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NVFP4_CLONES
#endif

namespace nvfp4::cpu {

// torch's thread pool; defined in csrc/ops/parallel.cpp. `body(begin, end)` covers [0, n) in disjoint ranges.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

void tensor_scale(const TensorScaleParams&);
void quantize(const QuantizeParams&);
void quantize_rows(const QuantizeRowsParams&);
// One row of it, scales linear.
void quantize_row_bf16(const bf16* x, int64_t K, uint8_t* packed, uint8_t* sf, float* scale);
// Linear scales [R, S] to their expert's atoms in sf [cosize]; every other byte of it becomes zero.
void group_sf(const SfGroups&, const uint8_t* linear, int64_t R, int64_t S, uint8_t* sf);
void dequantize(const DequantizeParams&);
void remap_sf(const RemapParams&);
void unmap_sf(const RemapParams&);
void pack_sm90(const PackParams&);
void unpack_sm90(const UnpackParams&);
void mxfp4_to_nvfp4(const Mxfp4Params&);

void grouped_gemm(const GemmParams&);
std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool packed_a);

void route(const RouteParams&);
void permute(const PermuteParams&);
void swiglu(const SwigluParams&);
void swiglu_quantize(const SwigluQuantizeParams&);
void combine(const CombineParams&);

}  // namespace nvfp4::cpu
