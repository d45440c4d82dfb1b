// The element-wise parts of the layer: activations and the weighted sum at its end.
#include "quantize_rows.cuh"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // bf16 values in 16 bytes

__device__ inline float low_of(uint32_t pair) { return float_of(pair << 16); }
__device__ inline float high_of(uint32_t pair) { return float_of(pair & 0xffff0000u); }
__device__ inline uint32_t pair_of(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// ---- activations ----------------------------------------------------------------------------------

template <class Body>
void with_act(Act act, Body body) {
  if (act == Act::silu) body(std::integral_constant<Act, Act::silu>{});
  if (act == Act::swiglu_limit) body(std::integral_constant<Act, Act::swiglu_limit>{});
  if (act == Act::swiglu_oai) body(std::integral_constant<Act, Act::swiglu_oai>{});
  if (act == Act::relu2) body(std::integral_constant<Act, Act::relu2>{});
}

// Of each half x between -limit and limit, which is positive; a NaN stays one.
__device__ inline __nv_bfloat162 within(__nv_bfloat162 x, __nv_bfloat162 limit) {
#if __CUDA_ARCH__ >= 860
  uint32_t& bits = reinterpret_cast<uint32_t&>(x);
  asm("min.NaN.xorsign.abs.bf16x2 %0, %0, %1;" : "+r"(bits) : "r"(reinterpret_cast<const uint32_t&>(limit)));
  return x;
#else
  return __hmax2_nan(__hmin2_nan(x, limit), __hneg2(limit));
#endif
}

template <Act act>
constexpr bool kClamped = act == Act::swiglu_limit || act == Act::swiglu_oai;
template <Act act>
constexpr bool kGated = act != Act::relu2;

template <Act act, int kValues>
struct Gated {  // as they lie in memory
  uint32_t gate[kValues / 2], up[kValues / 2];

  Gated() = default;
  __device__ Gated(const bf16* from, int64_t I, bool aligned) {
    load<kValues>(from, aligned, gate);
    if (kGated<act>) load<kValues>(from + I, aligned, up);
  }
};

// Which gates activate_mild() takes: those that meet no end of exp, once clamped in bf16. Pairs of bf16.
struct Mild {
  static constexpr uint32_t kBoth = 0x10001u, kInfinite = 0x7f80, kLargest = 0x7f7f, kNaN = 0x7fc0;
  float slope;
  uint32_t bound = kBoth * kNaN;  // the largest magnitude; the least gate where they are clamped; NaN: none
  uint32_t limit = kBoth * kInfinite;  // clamps nothing

  template <Act act>
  static Mild of(const SwigluParams& p) {
    Mild mild{swish_slope(act == Act::swiglu_oai ? p.act_alpha : 1.0f)};
    if (!is_finite(mild.slope)) return mild;
    const float steep = abs_of(mild.slope);
    uint32_t most = std::min(bits_of(kExp2Most / steep) >> 16, kLargest);
    if (float_of(most << 16) * steep > kExp2Most) --most;  // the quotient had been rounded up
    if (!kClamped<act>) {
      mild.bound = kBoth * most;
    } else if (p.limit > 0.0f && p.limit <= float_of(most << 16) && !(bits_of(p.limit) & 0xffff)) {
      mild.bound = kBoth * (0x8000 | most);
      mild.limit = kBoth * (bits_of(p.limit) >> 16);
    }
    return mild;
  }
};

__device__ inline __nv_bfloat162 bf16_pair(uint32_t bits) {
  return reinterpret_cast<const __nv_bfloat162&>(bits);
}

// Clamps x, two values an instruction (clamping again changes nothing), and says whether it is mild. A NaN
// beside a negative gate may be: activate_mild() leaves it one.
template <Act act, int kValues>
__device__ bool make_mild(Gated<act, kValues>& x, const Mild& mild) {
  if constexpr (!kGated<act>) return true;
  if constexpr (!kClamped<act>)
    return __hble2(__habs2(larger_of<__nv_bfloat162>(x.gate)), bf16_pair(mild.bound));
  uint32_t least = x.gate[0];  // of integers without a sign the largest: negative values lie above the others
#pragma unroll
  for (int i = 1; i + 1 < kValues / 2; i += 2) least = __vimax3_u16x2(least, x.gate[i], x.gate[i + 1]);
  least = __vmaxu2(least, x.gate[kValues / 2 - 1]);
  const __nv_bfloat162 limit = bf16_pair(mild.limit);
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    auto& g = reinterpret_cast<__nv_bfloat162&>(x.gate[i]);
    auto& u = reinterpret_cast<__nv_bfloat162&>(x.up[i]);
    g = __hmin2_nan(g, limit);
    u = within(u, limit);
  }
  return __hbge2(bf16_pair(least), bf16_pair(mild.bound));
}

template <Act act>
__device__ float activate_mild(float gate, float up, float slope) {
  if (!kGated<act>) return activate<act>(gate, up, 0.0f, 0.0f);
  const float s = swish_inside(gate, slope);
  return act == Act::swiglu_oai ? fma32(s, up, s) : s * up;
}

template <Act act, int kValues>
__device__ void activate_some(Gated<act, kValues> x, const SwigluParams& p, const Mild& mild,
                              uint32_t (&out)[kValues / 2]) {
  if (make_mild(x, mild)) {
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i)
      out[i] = pair_of(activate_mild<act>(low_of(x.gate[i]), low_of(x.up[i]), mild.slope),
                       activate_mild<act>(high_of(x.gate[i]), high_of(x.up[i]), mild.slope));
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kValues; ++i) {
    const float y = activate<act>(low_of(x.gate[0]), low_of(x.up[0]), p.act_alpha, p.limit);
    shift<16>(out, to_bf16(y).bits);
    shift<16>(x.gate, 0);
    shift<16>(x.up, 0);
  }
}

template <Act act>
__device__ const bf16* gate_of(const SwigluParams& p, int64_t r) {
  return p.gate_up + r * p.I * (act == Act::relu2 ? 1 : 2);
}

template <Act act>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(bool early, SwigluParams p, Mild mild) {
  start(early);
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, width = p.I / kVector;
  if (v >= p.R * width) return;
  const int64_t r = divide(v, width);
  const bf16* gate = gate_of<act>(p, r) + (v - r * width) * kVector;
  alignas(16) uint32_t out[kVector / 2];
  activate_some(Gated<act, kVector>(gate, p.I, true), p, mild, out);
  reinterpret_cast<uint4*>(p.out)[v] = reinterpret_cast<const uint4&>(out);
}

template <Act act>  // any width, any alignment
__global__ void __launch_bounds__(kThreads) swiglu_single_kernel(bool early, SwigluParams p) {
  start(early);
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (v >= p.R * p.I) return;
  const int64_t r = divide(v, p.I);
  const bf16* gate = gate_of<act>(p, r) + (v - r * p.I);
  const float up = act == Act::relu2 ? 0.0f : to_float(gate[p.I]);
  p.out[v] = to_bf16(activate<act>(to_float(gate[0]), up, p.act_alpha, p.limit));
}

template <Act act>
struct ActivatedRows {
  using Raw = Gated<act, kBlock>;
  static constexpr bool kCheap = false;
  SwigluParams p;
  Mild mild;
  bool aligned;

  struct Row {
    const ActivatedRows& rows;
    const bf16* gate;
    __device__ Gated<act, kBlock> load(int k) const {
      return {gate + static_cast<int64_t>(k) * blockDim.x * kBlock, rows.p.I, rows.aligned};
    }
    __device__ Block<bf16> block(const Raw& x) const {
      Block<bf16> b;
      activate_some(x, rows.p, rows.mild, b.word);
      return b;
    }
  };
  __device__ Row row(uint32_t r, uint32_t S) const {
    return {*this, p.gate_up + block_index(r, act == Act::relu2 ? S : 2 * S) * kBlock};
  }
};

// ---- combine --------------------------------------------------------------------------------------

constexpr int kSlots = 8;  // rows in flight: models send a token to 4 to 10 experts

__device__ inline void add(uint4 y, float weight, float (&acc)[kVector]) {
  const uint32_t word[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    acc[2 * i] = fma32(weight, low_of(word[i]), acc[2 * i]);
    acc[2 * i + 1] = fma32(weight, high_of(word[i]), acc[2 * i + 1]);
  }
}

// A CTA takes kThreads vectors of one token.
__global__ void __launch_bounds__(kThreads) combine_kernel(bool early, CombineParams p, unsigned chunks) {
  start(early);
  const int64_t t = blockIdx.x / chunks, v = blockIdx.x % chunks * kThreads + threadIdx.x,
                width = p.H / kVector;
  if (v >= width) return;
  const uint4* y = reinterpret_cast<const uint4*>(p.y) + v;
  float acc[kVector] = {};
  for (int64_t first = t * p.k, last = first + p.k; first < last; first += kSlots) {
    int slot[kSlots];
    uint4 row[kSlots];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      slot[j] = first + j < last ? p.slots[first + j] : -1;
      if (slot[j] >= p.R) slot[j] = -1;
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (slot[j] >= 0) row[j] = y[slot[j] * width];
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (slot[j] >= 0) add(row[j], p.weights[first + j], acc);
  }
  reinterpret_cast<uint4*>(p.out)[t * width + v] = {pair_of(acc[0], acc[1]), pair_of(acc[2], acc[3]),
                                                    pair_of(acc[4], acc[5]), pair_of(acc[6], acc[7])};
}

__global__ void __launch_bounds__(kThreads)
    combine_single_kernel(bool early, CombineParams p) {  // any width and alignment
  start(early);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.T * p.H) return;
  const int64_t t = divide(i, p.H), h = i - t * p.H;
  float acc = 0;
  for (int64_t j = t * p.k; j < (t + 1) * p.k; ++j)
    if (const int64_t slot = p.slots[j]; slot >= 0 && slot < p.R)
      acc = fma32(p.weights[j], to_float(p.y[slot * p.H + h]), acc);
  p.out[i] = to_bf16(acc);
}

}  // namespace

void swiglu(const SwigluParams& p, cudaStream_t stream) {
  const bool vectors = p.I % kVector == 0 && aligned16(p.gate_up) && aligned16(p.out);
  const int64_t ctas = ceil_div(vectors ? p.R * p.I / kVector : p.R * p.I, kThreads);
  with_act(p.act, [&](auto act) {
    if (vectors)
      launch(swiglu_kernel<act>, {ctas, kThreads}, stream, p, Mild::of<act>(p));
    else
      launch(swiglu_single_kernel<act>, {ctas, kThreads}, stream, p);
  });
}

void swiglu_quantize(const SwigluQuantizeParams& p, cudaStream_t stream) {
  const QuantizedRows out{p.swiglu.R, static_cast<int>(p.swiglu.I / kBlock), p.packed, p.sf, p.scale,
                          p.groups};
  with_act(p.swiglu.act, [&](auto act) {
    quantize_all_rows(ActivatedRows<act>{p.swiglu, Mild::of<act>(p.swiglu), aligned16(p.swiglu.gate_up)}, out,
                      stream);
  });
}

void combine(const CombineParams& p, cudaStream_t stream) {
  if (p.H % kVector == 0 && aligned16(p.y) && aligned16(p.out)) {
    const auto chunks = static_cast<unsigned>(ceil_div(p.H, kThreads * kVector));
    launch(combine_kernel, {p.T * chunks, kThreads}, stream, p, chunks);
  } else {
    launch(combine_single_kernel, {ceil_div(p.T * p.H, kThreads), kThreads}, stream, p);
  }
}

}  // namespace nvfp4::cuda
