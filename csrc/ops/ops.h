// Every operator, as registry.cpp registers it. Schemas and shapes: registry.cpp.
#pragma once
#include <tuple>

#include "../kernels/chip.h"
#include "tensor.h"

namespace nvfp4 {

using MaybeTensor = std::optional<Tensor>;

Tensor tensor_scale(const Tensor& x);
std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& scale);
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, const MaybeTensor& rows);
Tensor dequantize(const Tensor& packed, const Tensor& sf, const Tensor& scale, ScalarType dtype);
Tensor remap_sf(const Tensor& sf);
Tensor unmap_sf(const Tensor& sf, int64_t rows, int64_t cols);
Tensor pack_sm90(const Tensor& b, const Tensor& b_sf);
std::tuple<Tensor, Tensor> unpack_sm90(const Tensor& packed, int64_t K);
std::tuple<Tensor, Tensor, Tensor> mxfp4_to_nvfp4(const Tensor& packed, const Tensor& e8m0,
                                                  std::string method);

Tensor grouped_gemm(const Tensor& a, const MaybeTensor& a_sf, const MaybeTensor& a_scale, const Tensor& b,
                    const Tensor& b_sf, const Tensor& alpha, const Tensor& offsets, const MaybeTensor& bias);
Tensor linear(const Tensor& x, const Tensor& b, const Tensor& b_sf, const Tensor& alpha, std::string compute,
              const MaybeTensor& bias);
std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, std::string compute);

std::tuple<Tensor, Tensor> route(const Tensor& logits, const MaybeTensor& bias, int64_t top_k,
                                 std::string score, int64_t n_group, int64_t topk_group, bool renormalize,
                                 double scale);
std::tuple<Tensor, Tensor, Tensor> permute(const Tensor& ids, int64_t num_experts, int64_t first_expert);
Tensor swiglu(const Tensor& gate_up, std::string act, double act_alpha, double limit);
std::tuple<Tensor, Tensor, Tensor> swiglu_quantize(const Tensor& gate_up, std::string act, double act_alpha,
                                                   double limit);
Tensor combine(const Tensor& y, const Tensor& slots, const Tensor& weights);
Tensor moe(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w13, const Tensor& w13_sf,
           const Tensor& w13_alpha, const Tensor& w2, const Tensor& w2_sf, const Tensor& w2_alpha,
           int64_t first_expert, std::string compute, std::string act, double act_alpha, double limit,
           const MaybeTensor& w13_bias, const MaybeTensor& w2_bias);

// Scales as block-scaled tensor cores read a grouped product's rows (SfGroups) where `offsets` int32 [E+1]
// are given. Not in the public namespace: a layout that only the kernels of such a chip want.
std::tuple<Tensor, Tensor, Tensor> quantize_rows_grouped(const Tensor& x, const MaybeTensor& rows,
                                                         const MaybeTensor& offsets);
std::tuple<Tensor, Tensor, Tensor> swiglu_quantize_grouped(const Tensor& gate_up, std::string act,
                                                           double act_alpha, double limit,
                                                           const MaybeTensor& offsets);

// ---- shared by the op families ----

SfGroups groups_of(const char* op, const Tensor& home, const MaybeTensor& offsets);
Shape sf_shape(const SfGroups& groups, const Shape& lead, int64_t K);

// "nvfp4" quantizes the activations as well (W4A4), "bf16" only the weights (W4A16).
bool quantizes_activations(const char* op, const std::string& compute);
Act act_of(const char* op, const std::string& act);
// Whether weights are in sm90's own order: one dimension less than [.., N, K/2], and no scales.
bool is_packed(const Tensor& b, const Tensor& b_sf, int64_t dims);
// N of such weights, whose bytes and K say it.
int64_t packed_rows(const char* op, const std::string& w, const Tensor& b, int64_t K);
void expect_packed(const char* op, const std::string& w, const Tensor& home, const Tensor& b,
                   const Tensor& b_sf, const Shape& lead, int64_t N, int64_t K);
// b [E, N, K/2], b_sf [E, cosize], or both packed, alpha [E] or [E, 2], bias [E, N] or none: the weights of a
// grouped GEMM.
void expect_weights(const char* op, const std::string& w, const Tensor& home, const Tensor& b,
                    const Tensor& b_sf, const Tensor& alpha, const MaybeTensor& bias, int64_t E, int64_t N,
                    int64_t K);
// The part of GemmParams that such weights fill.
GemmParams weight_params(const Tensor& b, const Tensor& b_sf, const Tensor& alpha, const MaybeTensor& bias,
                         int64_t N, int64_t K);
// `w` names the weights: packed ones are refused where no chip takes them.
void launch_gemm(const char* op, const char* w, const Tensor& home, const GemmParams& p);
// For two products in one launch; `second` is one that the chip takes. Null: they are launched one by one.
const Chip* chip_for_pair(const Tensor& home, const GemmParams& first, const GemmParams& second);
void launch_pair(const Chip& chip, const Tensor& home, const GemmParams& first, const GemmParams& second);
// The chip whose kernel runs this product; null: the one that runs on every chip, or the CPU's.
const Chip* chip_for(const Tensor& home, const GemmParams& p);

}  // namespace nvfp4
