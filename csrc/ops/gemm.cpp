#include "../kernels/chip.h"
#include "launch.h"

namespace nvfp4 {

bool quantizes_activations(const char* op, const std::string& compute) {
  NVFP4_CHECK(compute == "nvfp4" || compute == "bf16", "nvfp4::", op,
              ": `compute` must be nvfp4 | bf16, got ", compute);
  return compute == "nvfp4";
}

void expect_weights(const char* op, const std::string& w, const Tensor& home, const Tensor& b,
                    const Tensor& b_sf, const Tensor& alpha, const MaybeTensor& bias, int64_t E, int64_t N,
                    int64_t K) {
  const std::string sf = w + "_sf", a = w == "b" ? "alpha" : w + "_alpha",
                    bs = w == "b" ? "bias" : w + "_bias";
  if (is_packed(b, b_sf, 2)) {
    expect_packed(op, w, home, b, b_sf, {E}, N, K);
  } else {
    expect(op, w.c_str(), b, home, {kU8}, "[E, N, K/2]", {E, N, K / 2});
    expect_weight(op, w.c_str(), b);
    expect(op, sf.c_str(), b_sf, home, {kF8}, "[E, cosize(N, K/16)]", {E, SfLayout{N, K / kBlock}.cosize()});
    expect_weight(op, sf.c_str(), b_sf);
  }
  if (alpha.dim() == 2) {
    expect(op, a.c_str(), alpha, home, {kF32}, "[E] or [E, 2]", {E, 2});
    expect_multiple(op, concat("N of `", w, "`, split between two alphas,").c_str(), N, 2);
  } else {
    expect(op, a.c_str(), alpha, home, {kF32}, "[E] or [E, 2]", {E});
  }
  expect_contiguous(op, a.c_str(), alpha);
  if (!bias) return;
  expect(op, bs.c_str(), *bias, home, {kF32}, "[E, N]", {E, N});
  expect_contiguous(op, bs.c_str(), *bias);
}

GemmParams weight_params(const Tensor& b, const Tensor& b_sf, const Tensor& alpha, const MaybeTensor& bias,
                         int64_t N, int64_t K) {
  GemmParams p{};
  p.b = in<uint8_t>(b);
  p.b_packed = is_packed(b, b_sf, 2);
  p.b_sf = p.b_packed ? nullptr : in<uint8_t>(b_sf);
  p.alpha = in<float>(alpha);
  p.alphas = alpha.dim() == 2 ? 2 : 1;
  p.bias = in<float>(bias);
  p.E = b.size(0);
  p.N = N;
  p.K = K;
  return p;
}

const Chip* chip_for(const Tensor& home, const GemmParams& p) {
  if (home.is_cpu()) return nullptr;
  const OnDevice device(home);
  const Chip* chip = nvfp4_chip_for(cuda::capability() / 10);
  return chip && chip->takes(p) ? chip : nullptr;
}

// Where packed weights are, and why no kernel of theirs runs.
static std::string no_chip(const Tensor& home, const GemmParams& p) {
  if (home.is_cpu()) return "on the CPU";
  const OnDevice device(home);
  const int capability = cuda::capability();
  const std::string here =
      concat("on a device of compute capability ", capability / 10, ".", capability % 10);
  if (!nvfp4_chip_for(capability / 10)) return here + " without a chip library";
  return concat(here, " that does not take R = ", p.R, ", N = ", p.N, ", K = ", p.K, ", E = ", p.E);
}

// The chip's own kernel where its library is loaded and takes it, else the one that runs on every chip.
void launch_gemm(const char* op, const char* w, const Tensor& home, const GemmParams& p) {
  const Chip* chip = chip_for(home, p);
  NVFP4_CHECK(chip || !p.b_packed || p.E == 0, "nvfp4::", op, ": `", w, "` is packed for sm90, got it ",
              no_chip(home, p), "; unpack_sm90 gives the layout back that runs everywhere");
  if (!chip) return launch(home, p, cpu::grouped_gemm, cuda::grouped_gemm);
  const OnDevice device(home);
  Tensor scratch = empty(home, {chip->workspace(p)}, kU8);
  chip->grouped_gemm(p, out<void>(scratch), device.stream);
}

const Chip* chip_for_pair(const Tensor& home, const GemmParams& first, const GemmParams& second) {
  const Chip* chip = chip_for(home, first);
  return chip && chip->takes_pair && chip->takes_pair(first, second) ? chip : nullptr;
}

void launch_pair(const Chip& chip, const Tensor& home, const GemmParams& first, const GemmParams& second) {
  const OnDevice device(home);
  Tensor scratch = empty(home, {chip.pair_workspace(first, second)}, kU8);
  chip.pair(first, second, out<void>(scratch), device.stream);
}

Tensor grouped_gemm(const Tensor& a, const MaybeTensor& a_sf, const MaybeTensor& a_scale, const Tensor& b,
                    const Tensor& b_sf, const Tensor& alpha, const Tensor& offsets, const MaybeTensor& bias) {
  const char* op = "grouped_gemm";
  const bool packed = is_packed(b, b_sf, 2);
  if (!packed) expect(op, "b", b, a, {kU8}, "[E, N, K/2]", {kAny, kAny, kAny});
  const int64_t half_K = packed ? kAny : b.size(2);
  if (!packed) expect_multiple(op, "K, twice the last dimension of `b`,", 2 * half_K, kBlock);
  NVFP4_CHECK(
      a_sf.has_value() == a_scale.has_value(), "nvfp4::", op,
      ": `a_sf` and `a_scale` must be given together (packed `a`) or not at all (bfloat16 `a`), got only ",
      a_sf ? "`a_sf`" : "`a_scale`");
  if (a_sf)
    expect(op, "a", a, a, {kU8}, "[R, K/2], packed as `a_sf` is given,", {kAny, half_K});
  else
    expect(op, "a", a, a, {kBf16}, "[R, K], as no `a_sf` is given,", {kAny, packed ? kAny : 2 * half_K});
  const int64_t E = b.size(0), R = a.size(0), K = a.size(1) * (a_sf ? 2 : 1);
  if (a_sf) expect(op, "a_sf", *a_sf, a, {kF8}, "[R, K/16]", {R, K / kBlock});
  const int64_t N = packed ? packed_rows(op, "b", b, K) : b.size(1);
  expect_weights(op, "b", a, b, b_sf, alpha, bias, E, N, K);
  expect(op, "offsets", offsets, a, {kI32}, "[E+1]", {E + 1});
  const Tensor rows = aligned(a), bounds = dense(offsets);
  const MaybeTensor blocks = dense(a_sf);
  const MaybeTensor scales =
      a_scale ? MaybeTensor(spread_scale(op, "a_scale", *a_scale, a, {R})) : std::nullopt;

  Tensor product = empty(a, {R, N}, kBf16);
  GemmParams p = weight_params(b, b_sf, alpha, bias, N, K);
  p.a_packed = a_sf ? in<uint8_t>(rows) : nullptr;
  p.a_sf = in<uint8_t>(blocks);
  p.a = a_sf ? nullptr : in<bf16>(rows);
  p.a_scale = in<float>(scales);
  p.a_scale_per_row = scales && scales->dim() > 0;
  p.a_rows = R;
  p.offsets = in<int32_t>(bounds);
  p.out = out<bf16>(product);
  p.R = R;
  launch_gemm(op, "b", a, p);
  return product;
}

Tensor linear(const Tensor& x, const Tensor& b, const Tensor& b_sf, const Tensor& alpha, std::string compute,
              const MaybeTensor& bias) {
  const char* op = "linear";
  const bool quantized = quantizes_activations(op, compute);
  const bool packed = is_packed(b, b_sf, 1);
  if (!packed) {
    expect(op, "b", b, x, {kU8}, "[N, K/2]", {kAny, kAny});
    expect_weight(op, "b", b);
    expect_multiple(op, "K, twice the last dimension of `b`,", 2 * b.size(1), kBlock);
  }
  expect_tail(op, "x", x, b, {kBf16}, "[.., K]", {packed ? kAny : 2 * b.size(1)});
  const int64_t K = x.size(-1), N = packed ? packed_rows(op, "b", b, K) : b.size(0);
  if (packed) {
    expect_packed(op, "b", x, b, b_sf, {}, N, K);
  } else {
    expect(op, "b_sf", b_sf, x, {kF8}, "[cosize(N, K/16)]", {SfLayout{N, K / kBlock}.cosize()});
    expect_weight(op, "b_sf", b_sf);
  }
  expect(op, "alpha", alpha, x, {kF32}, "[] or [N]", alpha.dim() == 0 ? Shape{} : Shape{N});
  if (bias) expect(op, "bias", *bias, x, {kF32}, "[N]", {N});
  const Tensor rows = aligned(x), alphas = dense(alpha);
  const MaybeTensor offset = dense(bias);
  const Shape lead = lead_of(x);

  Tensor product = empty(x, with(lead, {N}), kBf16);
  GemmParams p{};
  p.b = in<uint8_t>(b);
  p.b_packed = packed;
  p.b_sf = packed ? nullptr : in<uint8_t>(b_sf);
  p.alpha = in<float>(alphas);
  p.alphas = alpha.dim() == 0 ? 1 : N;
  p.bias = in<float>(offset);
  p.out = out<bf16>(product);
  p.R = p.a_rows = count(lead);
  p.N = N;
  p.K = K;
  p.E = 1;
  if (quantized) {
    const auto [codes, sf, scale] = quantize_rows(rows, std::nullopt);
    p.a_packed = in<uint8_t>(codes);
    p.a_sf = in<uint8_t>(sf);
    p.a_scale = in<float>(scale);
    p.a_scale_per_row = true;
    launch_gemm(op, "b", x, p);
  } else {
    p.a = in<bf16>(rows);
    launch_gemm(op, "b", x, p);
  }
  return product;
}

std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, std::string compute) {
  const bool quantized = quantizes_activations("gemm_plan", compute);
  NVFP4_CHECK(R >= 0 && N > 0 && E >= 0,
              "nvfp4::gemm_plan: sizes must not be negative and N must be positive, got R = ", R, ", N = ", N,
              ", E = ", E);
  expect_multiple("gemm_plan", "K", K, kBlock);
  const int capability = cuda::capability();
  if (capability == 0) return cpu::gemm_plan(R, N, K, E, quantized);
  const Chip* chip = nvfp4_chip_for(capability / 10);
  alignas(16) static const bf16 any{};
  GemmParams p{};
  p.a = quantized ? nullptr : &any;
  p.R = R, p.N = N, p.K = K, p.E = E;
  return (chip && chip->takes(p) ? chip->gemm_plan : cuda::gemm_plan)(R, N, K, E, quantized);
}

}  // namespace nvfp4
