// Every operator of torch.ops.nvfp4: the table of contents. Inputs are never written; outputs are always new
// and every byte of them is written. What the operators compute: nvfp4_moe/reference/.
#include "ops.h"

STABLE_TORCH_LIBRARY(nvfp4, m) {
  m.def("tensor_scale(Tensor x) -> Tensor");
  m.def("quantize(Tensor x, Tensor scale) -> (Tensor packed, Tensor sf)");
  m.def("quantize_rows(Tensor x, Tensor? rows=None) -> (Tensor packed, Tensor sf, Tensor scale)");
  m.def("dequantize(Tensor packed, Tensor sf, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("remap_sf(Tensor sf) -> Tensor");
  m.def("unmap_sf(Tensor sf, int rows, int cols) -> Tensor");
  m.def("pack_sm90(Tensor b, Tensor b_sf) -> Tensor");
  m.def("unpack_sm90(Tensor packed, int K) -> (Tensor b, Tensor b_sf)");
  m.def("mxfp4_to_nvfp4(Tensor packed, Tensor e8m0, str method) -> (Tensor packed, Tensor sf, Tensor alpha)");

  m.def(
      "grouped_gemm(Tensor a, Tensor? a_sf, Tensor? a_scale, Tensor b, Tensor b_sf, Tensor alpha, Tensor "
      "offsets, "
      "Tensor? bias=None) -> Tensor");
  m.def("linear(Tensor x, Tensor b, Tensor b_sf, Tensor alpha, str compute, Tensor? bias=None) -> Tensor");
  m.def("gemm_plan(int R, int N, int K, int E, str compute) -> str");

  m.def(
      "route(Tensor logits, Tensor? bias, int top_k, str score, int n_group, int topk_group, bool "
      "renormalize, "
      "float scale) -> (Tensor weights, Tensor ids)");
  m.def(
      "permute(Tensor ids, int num_experts, int first_expert) -> (Tensor rows, Tensor offsets, Tensor "
      "slots)");
  m.def("swiglu(Tensor gate_up, str act, float act_alpha, float limit) -> Tensor");
  m.def(
      "swiglu_quantize(Tensor gate_up, str act, float act_alpha, float limit) -> (Tensor packed, Tensor sf, "
      "Tensor scale)");
  m.def("combine(Tensor y, Tensor slots, Tensor weights) -> Tensor");
  m.def(
      "moe(Tensor x, Tensor ids, Tensor weights, Tensor w13, Tensor w13_sf, Tensor w13_alpha, Tensor w2, "
      "Tensor w2_sf, Tensor w2_alpha, int first_expert, str compute, str act, float act_alpha, float limit, "
      "Tensor? w13_bias=None, Tensor? w2_bias=None) -> Tensor");
}

// One function an operator: it looks where its tensors are when it launches.
static void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("tensor_scale", TORCH_BOX(&nvfp4::tensor_scale));
  m.impl("quantize", TORCH_BOX(&nvfp4::quantize));
  m.impl("quantize_rows", TORCH_BOX(&nvfp4::quantize_rows));
  m.impl("dequantize", TORCH_BOX(&nvfp4::dequantize));
  m.impl("remap_sf", TORCH_BOX(&nvfp4::remap_sf));
  m.impl("unmap_sf", TORCH_BOX(&nvfp4::unmap_sf));
  m.impl("pack_sm90", TORCH_BOX(&nvfp4::pack_sm90));
  m.impl("unpack_sm90", TORCH_BOX(&nvfp4::unpack_sm90));
  m.impl("mxfp4_to_nvfp4", TORCH_BOX(&nvfp4::mxfp4_to_nvfp4));
  m.impl("grouped_gemm", TORCH_BOX(&nvfp4::grouped_gemm));
  m.impl("linear", TORCH_BOX(&nvfp4::linear));
  m.impl("route", TORCH_BOX(&nvfp4::route));
  m.impl("permute", TORCH_BOX(&nvfp4::permute));
  m.impl("swiglu", TORCH_BOX(&nvfp4::swiglu));
  m.impl("swiglu_quantize", TORCH_BOX(&nvfp4::swiglu_quantize));
  m.impl("combine", TORCH_BOX(&nvfp4::combine));
  m.impl("moe", TORCH_BOX(&nvfp4::moe));
}

STABLE_TORCH_LIBRARY_IMPL(nvfp4, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(nvfp4, CUDA, m) { implement(m); }
// What only chip kernels and the tests of them need.
STABLE_TORCH_LIBRARY(nvfp4_internal, m) {
  m.def("quantize_rows_grouped(Tensor x, Tensor? rows, Tensor? offsets) -> (Tensor, Tensor, Tensor)");
  m.def(
      "swiglu_quantize_grouped(Tensor gate_up, str act, float act_alpha, float limit, Tensor? offsets) -> "
      "(Tensor, Tensor, Tensor)");
}

static void implement_internal(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize_rows_grouped", TORCH_BOX(&nvfp4::quantize_rows_grouped));
  m.impl("swiglu_quantize_grouped", TORCH_BOX(&nvfp4::swiglu_quantize_grouped));
}

STABLE_TORCH_LIBRARY_IMPL(nvfp4_internal, CPU, m) { implement_internal(m); }
STABLE_TORCH_LIBRARY_IMPL(nvfp4_internal, CUDA, m) { implement_internal(m); }

STABLE_TORCH_LIBRARY_IMPL(nvfp4, CompositeExplicitAutograd, m) {
  m.impl("gemm_plan", TORCH_BOX(&nvfp4::gemm_plan));
}
