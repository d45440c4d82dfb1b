#include "launch.h"

namespace nvfp4 {

// x [.., K] of a float type, K a multiple of 16; returned contiguous.
static Tensor expect_values(const char* op, const Tensor& x) {
  expect_tail(op, "x", x, x, {kF32, kF16, kBf16}, "[.., K]", {kAny});
  expect_multiple(op, "K, the last dimension of `x`,", x.size(-1), kBlock);
  return dense(x);
}

Tensor tensor_scale(const Tensor& x) {
  expect_tail("tensor_scale", "x", x, x, {kF32, kF16, kBf16}, "[..]", {});
  const Tensor values = dense(x);
  Tensor scale = empty(x, {}, kF32);
  const TensorScaleParams p{in<void>(values), real_of(x.scalar_type()), x.numel(), out<float>(scale)};
  launch(x, p, cpu::tensor_scale, cuda::tensor_scale);
  return scale;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& scale) {
  const Tensor values = expect_values("quantize", x);
  const Shape lead = lead_of(x);
  const Tensor spread = spread_scale("quantize", "scale", scale, x, lead);
  const int64_t K = x.size(-1);

  Tensor packed = empty(x, with(lead, {K / 2}), kU8), sf = empty(x, with(lead, {K / kBlock}), kF8);
  const QuantizeParams p{
      in<void>(values),     real_of(x.scalar_type()), in<float>(spread), spread.dim() > 0, count(lead), K,
      out<uint8_t>(packed), out<uint8_t>(sf)};
  launch(x, p, cpu::quantize, cuda::quantize);
  return {packed, sf};
}

SfGroups groups_of(const char* op, const Tensor& home, const MaybeTensor& offsets) {
  if (!offsets) return {nullptr, 0};
  expect(op, "offsets", *offsets, home, {kI32}, "[E+1]", {kAny});
  expect_contiguous(op, "offsets", *offsets);
  NVFP4_CHECK(offsets->numel() > 0, "nvfp4::", op, ": `offsets` must have E + 1 entries, got none");
  return {in<int32_t>(*offsets), offsets->numel() - 1};
}

Shape sf_shape(const SfGroups& groups, const Shape& lead, int64_t K) {
  if (!groups.offsets) return with(lead, {K / kBlock});
  return {SfGroups::cosize(count(lead), groups.E, K / kBlock)};
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, const MaybeTensor& rows) {
  return quantize_rows_grouped(x, rows, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows_grouped(const Tensor& x, const MaybeTensor& rows,
                                                         const MaybeTensor& offsets) {
  const Tensor values = expect_values("quantize_rows", x);
  const int64_t K = x.size(-1);
  Shape lead = lead_of(x);
  const int64_t T = count(lead);
  MaybeTensor index;
  if (rows) {
    expect("quantize_rows", "x", x, x, {kF32, kF16, kBf16}, "[T, K] where `rows` is given", {kAny, K});
    expect("quantize_rows", "rows", *rows, x, {kI32}, "[R]", {kAny});
    NVFP4_CHECK(T > 0 || rows->numel() == 0, "nvfp4::quantize_rows: `x` must have a row to gather, got ",
                show(shape_of(x)), " with ", rows->numel(), " `rows`");
    index = dense(*rows);
    lead = {rows->numel()};
  }

  const SfGroups groups = groups_of("quantize_rows", x, offsets);
  Tensor packed = empty(x, with(lead, {K / 2}), kU8), sf = empty(x, sf_shape(groups, lead, K), kF8);
  Tensor scale = empty(x, lead, kF32);
  const QuantizeRowsParams p{
      in<void>(values),     real_of(x.scalar_type()), in<int32_t>(index), T,     count(lead), K,
      out<uint8_t>(packed), out<uint8_t>(sf),         out<float>(scale),  groups};
  launch(x, p, cpu::quantize_rows, cuda::quantize_rows);
  return {packed, sf, scale};
}

Tensor dequantize(const Tensor& packed, const Tensor& sf, const Tensor& scale, ScalarType dtype) {
  expect_tail("dequantize", "packed", packed, packed, {kU8}, "[.., K/2]", {kAny});
  const Shape lead = lead_of(packed);
  const int64_t K = 2 * packed.size(-1);
  expect_multiple("dequantize", "K, twice the last dimension of `packed`,", K, kBlock);
  expect("dequantize", "sf", sf, packed, {kF8}, "[.., K/16]", with(lead, {K / kBlock}));
  NVFP4_CHECK(dtype == kF32 || dtype == kF16 || dtype == kBf16,
              "nvfp4::dequantize: `dtype` must be float32 | float16 | bfloat16, got ", show(dtype));
  const Tensor spread = spread_scale("dequantize", "scale", scale, packed, lead);
  const Tensor codes = dense(packed), blocks = dense(sf);

  Tensor values = empty(packed, with(lead, {K}), dtype);
  const DequantizeParams p{in<uint8_t>(codes), in<uint8_t>(blocks), in<float>(spread),
                           spread.dim() > 0,   count(lead),         K,
                           out<void>(values),  real_of(dtype)};
  launch(packed, p, cpu::dequantize, cuda::dequantize);
  return values;
}

std::tuple<Tensor, Tensor, Tensor> mxfp4_to_nvfp4(const Tensor& packed, const Tensor& e8m0,
                                                  std::string method) {
  const char* op = "mxfp4_to_nvfp4";
  constexpr int64_t kMxBlock = 32;
  static const std::pair<const char*, Mxfp4> kMethods[] = {{"best", Mxfp4::best},
                                                           {"requantize", Mxfp4::requantize},
                                                           {"verbatim_midpoint", Mxfp4::verbatim_midpoint},
                                                           {"verbatim_search", Mxfp4::verbatim_search},
                                                           {"hybrid", Mxfp4::hybrid}};
  expect_tail(op, "packed", packed, packed, {kU8}, "[.., N, K/2]", {kAny, kAny});
  const int64_t N = packed.size(-2), K = 2 * packed.size(-1);
  expect_multiple(op, "K, twice the last dimension of `packed`,", K, kMxBlock);
  const Shape lead = lead_of(packed, 2);
  expect(op, "e8m0", e8m0, packed, {kU8, kE8}, "[.., N, K/32]", with(lead, {N, K / kMxBlock}));
  const Mxfp4* chosen = nullptr;
  for (const auto& [name, value] : kMethods)
    if (method == name) chosen = &value;
  NVFP4_CHECK(chosen, "nvfp4::", op,
              ": `method` must be best | requantize | verbatim_midpoint | verbatim_search | hybrid, got ",
              method);
  const Tensor codes = aligned(packed), exponents = aligned(e8m0);

  Tensor packed_out = empty(packed, with(lead, {N, K / 2}), kU8),
         sf = empty(packed, with(lead, {N, K / kBlock}), kF8);
  Tensor alpha = empty(packed, lead, kF32);
  const Mxfp4Params p{in<uint8_t>(codes),       in<uint8_t>(exponents), *chosen,          count(lead), N, K,
                      out<uint8_t>(packed_out), out<uint8_t>(sf),       out<float>(alpha)};
  launch(packed, p, cpu::mxfp4_to_nvfp4, cuda::mxfp4_to_nvfp4, cuda::mxfp4_workspace);
  return {packed_out, sf, alpha};
}

}  // namespace nvfp4
