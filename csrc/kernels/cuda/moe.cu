// The element-wise parts of the layer: activations and the weighted sum at its end.
#include "vector.cuh"

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

// math.h's swish32 where |beta g| <= 80 and |beta| <= 2^10, bit for bit in half the instructions: exp32
// without its ends, its 2^n added to the exponent; and for the quotient what nvcc emits where nothing over-
// or underflows (it is above 2^-122, or g is so small that the divisor is 2).
__device__ inline float swish_mild(float g, float beta) {
  constexpr float kMagic = 0x1.8p23f;
  const float x = -(beta * g), shifted = x * 0x1.715476p+0f + kMagic, n = shifted - kMagic;
  const float t = fma32(n, -0x1.7f7d1cp-20f, fma32(n, -0x1.62e400p-1f, x));
  float y = 0x1.a01a02p-13f;
  y = fma32(y, t, 0x1.6c16c2p-10f);
  y = fma32(y, t, 0x1.111112p-7f);
  y = fma32(y, t, 0x1.555556p-5f);
  y = fma32(y, t, 0x1.555556p-3f);
  y = fma32(y, t, 0.5f);
  y = fma32(y, t, 1.0f);
  y = fma32(y, t, 1.0f);
  const float d = 1.0f + float_of(bits_of(y) + (bits_of(shifted) << 23));
  const float r0 = fast_reciprocal(d), r = fma32(r0, fma32(-d, r0, 1.0f), r0), q = g * r;
  return fma32(-r, fma32(d, q, -g), q);  // these signs keep that of a zero g
}

template <Act act>
__device__ float activate_mild(float gate, float up, float act_alpha, float limit) {
  if (act == Act::relu2) return activate<act>(gate, up, act_alpha, limit);
  if (act == Act::silu) return swish_mild(gate, 1.0f) * up;
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : up < -limit ? -limit : up;
  if (act == Act::swiglu_limit) return swish_mild(g, 1.0f) * u;
  return swish_mild(g, act_alpha) * (u + 1.0f);
}

// May activate_mild take these gates? A NaN among them says no.
template <Act act, int kWords>
__device__ bool mild(const uint32_t (&gate)[kWords], float act_alpha, float limit) {
  if (act == Act::relu2) return true;
  const float beta = act == Act::swiglu_oai ? fabsf(act_alpha) : 1.0f;
  if (act != Act::silu && !(limit >= 0.0f)) return false;
  return float_of(largest<bf16>(gate)) * beta <= 80.0f && beta <= 1024.0f;
}

// The activation of kValues gates and ups, all read before any is used.
template <Act act, int kValues>
__device__ void activate_some(const bf16* gate, const bf16* up, bool aligned, const SwigluParams& p,
                              uint32_t (&out)[kValues / 2]) {
  uint32_t g[kValues / 2], u[kValues / 2] = {};
  load<kValues>(gate, aligned, g);
  if (act != Act::relu2) load<kValues>(up, aligned, u);
  if (mild<act>(g, p.act_alpha, p.limit)) {
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i)
      out[i] = pair_of(activate_mild<act>(low_of(g[i]), low_of(u[i]), p.act_alpha, p.limit),
                       activate_mild<act>(high_of(g[i]), high_of(u[i]), p.act_alpha, p.limit));
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kValues; ++i) {
    shift<16>(out, to_bf16(activate<act>(low_of(g[0]), low_of(u[0]), p.act_alpha, p.limit)).bits);
    shift<16>(g, 0);
    shift<16>(u, 0);
  }
}

template <Act act>
__device__ const bf16* gate_of(const SwigluParams& p, int64_t r) {
  return p.gate_up + r * p.I * (act == Act::relu2 ? 1 : 2);
}

template <Act act>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(bool early, SwigluParams p) {
  start(early);
  const int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, width = p.I / kVector;
  if (v >= p.R * width) return;
  const int64_t r = divide(v, width);
  const bf16* gate = gate_of<act>(p, r) + (v - r * width) * kVector;
  alignas(16) uint32_t out[kVector / 2];
  activate_some<act, kVector>(gate, gate + p.I, true, p, out);
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
  static constexpr bool kCheap = false;
  SwigluParams p;
  bool aligned;

  struct Row {
    const ActivatedRows& rows;
    const bf16* gate;
    __device__ Block<bf16> operator()(int64_t s) const {
      const bf16* first = gate + s * kBlock;
      Block<bf16> b;
      activate_some<act, kBlock>(first, first + rows.p.I, rows.aligned, rows.p, b.word);
      return b;
    }
  };
  __device__ Row row(int64_t r) const { return {*this, gate_of<act>(p, r)}; }
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
    launch(vectors ? swiglu_kernel<act> : swiglu_single_kernel<act>, {ctas, kThreads}, stream, p);
  });
}

void swiglu_quantize(const SwigluQuantizeParams& p, cudaStream_t stream) {
  const QuantizedRows out{p.swiglu.R, static_cast<int>(p.swiglu.I / kBlock), p.packed, p.sf, p.scale,
                          p.groups};
  with_act(p.swiglu.act, [&](auto act) {
    quantize_all_rows(ActivatedRows<act>{p.swiglu, aligned16(p.swiglu.gate_up)}, out, stream);
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
