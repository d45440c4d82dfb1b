// Routing, activations, combine, and the whole layer composed of them.
#include <climits>

#include "launch.h"

namespace nvfp4 {

Act act_of(const char* op, const std::string& act) {
  if (act == "silu") return Act::silu;
  if (act == "swiglu_limit") return Act::swiglu_limit;
  if (act == "swiglu_oai") return Act::swiglu_oai;
  NVFP4_CHECK(act == "relu2", "nvfp4::", op, ": `act` must be silu | swiglu_limit | swiglu_oai | relu2, got ",
              act);
  return Act::relu2;
}

static Score score_of(const std::string& score) {
  if (score == "softmax") return Score::softmax;
  if (score == "sigmoid") return Score::sigmoid;
  NVFP4_CHECK(score == "sqrt_softplus",
              "nvfp4::route: `score` must be softmax | sigmoid | sqrt_softplus, got ", score);
  return Score::sqrt_softplus;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, const MaybeTensor& bias, int64_t top_k,
                                 std::string score, int64_t n_group, int64_t topk_group, bool renormalize,
                                 double scale) {
  expect("route", "logits", logits, logits, {kF32, kF16, kBf16}, "[T, E]", {kAny, kAny});
  const int64_t T = logits.size(0), E = logits.size(1);
  if (bias) expect("route", "bias", *bias, logits, {kF32}, "[E]", {E});
  NVFP4_CHECK(top_k >= 1 && top_k <= E, "nvfp4::route: `top_k` must be in 1 .. E = ", E, ", got ", top_k);
  NVFP4_CHECK(n_group >= 1 && E % n_group == 0, "nvfp4::route: `n_group` must divide E = ", E, ", got ",
              n_group);
  NVFP4_CHECK(topk_group >= 1 && topk_group <= n_group,
              "nvfp4::route: `topk_group` must be in 1 .. n_group = ", n_group, ", got ", topk_group);
  const Score kind = score_of(score);
  const Tensor scores = dense(logits);
  const MaybeTensor offset = dense(bias);

  Tensor weights = empty(logits, {T, top_k}, kF32), ids = empty(logits, {T, top_k}, kI32);
  const RouteParams p{in<void>(scores),
                      real_of(logits.scalar_type()),
                      in<float>(offset),
                      T,
                      E,
                      static_cast<int>(top_k),
                      static_cast<int>(n_group),
                      static_cast<int>(topk_group),
                      kind,
                      renormalize,
                      static_cast<float>(scale),
                      out<float>(weights),
                      out<int32_t>(ids)};
  launch(logits, p, cpu::route, cuda::route);
  return {weights, ids};
}

std::tuple<Tensor, Tensor, Tensor> permute(const Tensor& ids, int64_t num_experts, int64_t first_expert) {
  expect("permute", "ids", ids, ids, {kI32}, "[T, k]", {kAny, kAny});
  NVFP4_CHECK(num_experts >= 0 && num_experts < INT_MAX,
              "nvfp4::permute: `num_experts` must not be negative, got ", num_experts);
  NVFP4_CHECK(ids.numel() < INT_MAX, "nvfp4::permute: `ids` must have fewer than 2^31 entries, got ",
              show(shape_of(ids)));
  const Tensor choices = dense(ids);
  const int64_t T = ids.size(0), k = ids.size(1);

  Tensor rows = empty(ids, {T * k}, kI32), offsets = empty(ids, {num_experts + 1}, kI32),
         slots = empty(ids, {T, k}, kI32);
  const PermuteParams p{
      in<int32_t>(choices), T, k, num_experts, first_expert, out<int32_t>(rows), out<int32_t>(offsets),
      out<int32_t>(slots)};
  launch(ids, p, cpu::permute, cuda::permute, cuda::permute_workspace);
  return {rows, offsets, slots};
}

// gate_up [.., 2I] or, for relu2, [.., I]; returned contiguous in p, with I and R read off.
static SwigluParams expect_gate_up(const char* op, const Tensor& gate_up, const std::string& act,
                                   double act_alpha, double limit) {
  const Act kind = act_of(op, act);
  expect_tail(op, "gate_up", gate_up, gate_up, {kBf16}, "[.., 2I] ([.., I] for relu2)", {kAny});
  const int64_t width = gate_up.size(-1), halves = kind == Act::relu2 ? 1 : 2;
  expect_multiple(op, "the last dimension of `gate_up`", width, halves);
  return {nullptr,
          kind,
          static_cast<float>(act_alpha),
          static_cast<float>(limit),
          count(lead_of(gate_up)),
          width / halves,
          nullptr};
}

Tensor swiglu(const Tensor& gate_up, std::string act, double act_alpha, double limit) {
  SwigluParams p = expect_gate_up("swiglu", gate_up, act, act_alpha, limit);
  const Tensor pairs = dense(gate_up);
  Tensor hidden = empty(gate_up, with(lead_of(gate_up), {p.I}), kBf16);
  p.gate_up = in<bf16>(pairs);
  p.out = out<bf16>(hidden);
  launch(gate_up, p, cpu::swiglu, cuda::swiglu);
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> swiglu_quantize(const Tensor& gate_up, std::string act, double act_alpha,
                                                   double limit) {
  return swiglu_quantize_grouped(gate_up, act, act_alpha, limit, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> swiglu_quantize_grouped(const Tensor& gate_up, std::string act,
                                                           double act_alpha, double limit,
                                                           const MaybeTensor& offsets) {
  SwigluParams p = expect_gate_up("swiglu_quantize", gate_up, act, act_alpha, limit);
  expect_multiple("swiglu_quantize", "I, the activation's width,", p.I, kBlock);
  const Tensor pairs = dense(gate_up);
  const Shape lead = lead_of(gate_up);
  p.gate_up = in<bf16>(pairs);

  const SfGroups groups = groups_of("swiglu_quantize", gate_up, offsets);
  Tensor packed = empty(gate_up, with(lead, {p.I / 2}), kU8);
  Tensor sf = empty(gate_up, sf_shape(groups, lead, p.I), kF8);
  Tensor scale = empty(gate_up, lead, kF32);
  const SwigluQuantizeParams q{p, out<uint8_t>(packed), out<uint8_t>(sf), out<float>(scale), groups};
  launch(gate_up, q, cpu::swiglu_quantize, cuda::swiglu_quantize);
  return {packed, sf, scale};
}

Tensor combine(const Tensor& y, const Tensor& slots, const Tensor& weights) {
  expect("combine", "y", y, y, {kBf16}, "[R, H]", {kAny, kAny});
  expect("combine", "slots", slots, y, {kI32}, "[T, k]", {kAny, kAny});
  const int64_t T = slots.size(0), k = slots.size(1), H = y.size(1);
  expect("combine", "weights", weights, y, {kF32}, "[T, k]", {T, k});
  const Tensor rows = dense(y), places = dense(slots), factors = dense(weights);

  Tensor sum = empty(y, {T, H}, kBf16);
  const CombineParams p{in<bf16>(rows), in<int32_t>(places), in<float>(factors), y.size(0), H, T, k,
                        out<bf16>(sum)};
  launch(y, p, cpu::combine, cuda::combine);
  return sum;
}

using Quantized = std::tuple<Tensor, Tensor, Tensor>;

static void give_codes(GemmParams& p, const Quantized& quantized) {
  p.a_packed = in<uint8_t>(std::get<0>(quantized));
  p.a_sf = in<uint8_t>(std::get<1>(quantized));
  p.a_scale = in<float>(std::get<2>(quantized));
  p.a_scale_per_row = true;
}

// Block-scaled tensor cores read rows as the copy engine brings them: gathered, their scales by expert.
static bool want_grouped_sf(const Tensor& home, GemmParams& p) {
  GemmParams grouped = p;
  grouped.rows = grouped.slots = nullptr;
  grouped.a_sf_grouped = true;
  if (!chip_for(home, grouped)) return false;
  p = grouped;
  return true;
}

// Lets the chip quantize a product's activations itself, where it can.
static bool let_quantize(const Tensor& home, GemmParams& p, const Tensor& a) {
  GemmParams quantizing = p;
  quantizing.a = in<bf16>(a);
  quantizing.quantize_a = true;
  if (!chip_for(home, quantizing)) return false;
  p = quantizing;
  return true;
}

// Lets the chip fuse the activation into the layer's first product, where it can.
static void fuse_activation(const Tensor& home, GemmParams& p, Act act, double act_alpha, double limit) {
  GemmParams fused = p;
  fused.activated = true;
  fused.act = act;
  fused.act_alpha = static_cast<float>(act_alpha);
  fused.limit = static_cast<float>(limit);
  if (chip_for(home, fused)) p = fused;
}

// I, the layer's width inside, of its weights; their shapes are checked later.
static int64_t width_of(const Tensor& x, const Tensor& w13, const Tensor& w13_sf, const Tensor& w2,
                        const Tensor& w2_sf, int64_t halves) {
  const char* op = "moe";
  const int64_t H = x.size(1);
  const bool packed = is_packed(w13, w13_sf, 2);
  NVFP4_CHECK(packed == is_packed(w2, w2_sf, 2), "nvfp4::", op,
              ": `w13` and `w2` must both be packed for sm90 or neither, got only ",
              packed ? "`w13`" : "`w2`");
  if (packed) return packed_rows(op, "w13", w13, H) / halves;
  expect(op, "w2", w2, x, {kU8}, "[E, H, I/2]", {kAny, H, kAny});
  expect_multiple(op, "H, the last dimension of `x`,", H, kBlock);
  expect_multiple(op, "I, twice the last dimension of `w2`,", 2 * w2.size(2), kBlock);
  return 2 * w2.size(2);
}

Tensor moe(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w13, const Tensor& w13_sf,
           const Tensor& w13_alpha, const Tensor& w2, const Tensor& w2_sf, const Tensor& w2_alpha,
           int64_t first_expert, std::string compute, std::string act, double act_alpha, double limit,
           const MaybeTensor& w13_bias, const MaybeTensor& w2_bias) {
  const char* op = "moe";
  const bool quantized = quantizes_activations(op, compute);
  const Act kind = act_of(op, act);
  expect(op, "x", x, x, {kBf16}, "[T, H]", {kAny, kAny});
  const int64_t T = x.size(0), H = x.size(1);
  expect(op, "ids", ids, x, {kI32}, "[T, k]", {T, kAny});
  const int64_t k = ids.size(1), R = T * k;
  expect(op, "weights", weights, x, {kF32}, "[T, k]", {T, k});
  const int64_t halves = kind == Act::relu2 ? 1 : 2, I = width_of(x, w13, w13_sf, w2, w2_sf, halves);
  const int64_t E = w2.size(0), gate_up_width = halves * I;
  expect_weights(op, "w13", x, w13, w13_sf, w13_alpha, w13_bias, E, gate_up_width, H);
  expect_weights(op, "w2", x, w2, w2_sf, w2_alpha, w2_bias, E, H, I);
  const Tensor tokens = aligned(x);

  const Tensor choices = dense(ids);
  const auto [rows, offsets, slots] = permute(choices, E, first_expert);
  GemmParams first = weight_params(w13, w13_sf, w13_alpha, w13_bias, gate_up_width, H);
  GemmParams second = weight_params(w2, w2_sf, w2_alpha, w2_bias, H, I);
  first.rows = in<int32_t>(rows);
  first.slots = in<int32_t>(slots);
  first.a_rows = T;
  second.a_rows = R;
  first.offsets = second.offsets = in<int32_t>(offsets);
  first.R = second.R = R;
  second.leave_tail = true;  // combine reads rows of experts only
  std::optional<Quantized> codes;
  if (!quantized) {
    first.a = in<bf16>(tokens);
  } else if (!let_quantize(x, first, tokens)) {
    // elsewhere a token is quantized once and gathered as codes: the same bits either way
    const bool grouped = want_grouped_sf(x, first);
    give_codes(first, codes.emplace(quantize_rows_grouped(tokens, grouped ? MaybeTensor(rows) : std::nullopt,
                                                          grouped ? MaybeTensor(offsets) : std::nullopt)));
  }

  fuse_activation(x, first, kind, act_alpha, limit);
  first.out_in_k_order = second.a_in_k_order = first.activated && !quantized && chip_for(x, second);
  first.leave_tail = first.activated && !quantized;  // or the tail is read by what follows
  Tensor hidden = empty(x, {R, first.activated ? I : gate_up_width}, kBf16);
  first.out = out<bf16>(hidden);
  GemmParams counting = first;
  counting.ids = in<int32_t>(choices);
  counting.first_expert = first_expert;
  const Chip* both = first.out_in_k_order ? chip_for_pair(x, counting, second) : nullptr;
  if (!both) launch_gemm(op, "w13", x, first);
  if (!quantized) {
    second.a = in<bf16>(first.activated ? hidden : hidden = swiglu(hidden, act, act_alpha, limit));
  } else if (!first.activated || !let_quantize(x, second, hidden)) {
    const MaybeTensor by = want_grouped_sf(x, second) ? MaybeTensor(offsets) : std::nullopt;
    give_codes(second,
               codes.emplace(first.activated ? quantize_rows_grouped(hidden, std::nullopt, by)
                                             : swiglu_quantize_grouped(hidden, act, act_alpha, limit, by)));
  }
  Tensor y = empty(x, {R, H}, kBf16);
  second.out = out<bf16>(y);
  if (both)
    launch_pair(*both, x, counting, second);
  else
    launch_gemm(op, "w2", x, second);
  return combine(y, slots, weights);
}

}  // namespace nvfp4
