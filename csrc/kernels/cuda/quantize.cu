// tensor_scale, quantize, quantize_rows, dequantize. Memory is what bounds them: each value is read once.
#include "quantize_rows.cuh"

namespace nvfp4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // blocks a thread has in flight: 94 % of the copy rate on an H200, 1 gives 86 %

template <class Body>
void with_dtype(Real dtype, const void* x, Body body) {
  if (dtype == Real::f32) body(static_cast<const float*>(x));
  if (dtype == Real::bf16) body(static_cast<const bf16*>(x));
  if (dtype == Real::f16) body(static_cast<const f16*>(x));
}

// ---- tensor_scale ---------------------------------------------------------------------------------

// Magnitudes order as their bits do, so *scale gathers the maximum as an integer. A lone CTA finishes it too.
template <class T>
__global__ void __launch_bounds__(kThreads)
    amax_kernel(bool early, const T* x, int64_t count, bool aligned, float* scale) {
  __shared__ uint32_t tops[kThreads / 32];
  start(early);
  const int64_t blocks = count / kBlock, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t top = 0;
#pragma unroll 4
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < blocks; b += stride) {
    const Block<T> block = load_block(x + b * kBlock, aligned);
    top = max(top, largest_finite(block, largest(block)));
  }
  if (const int64_t i = blocks * kBlock + threadIdx.x; blockIdx.x == 0 && i < count)
    if (const float v = to_float(x[i]); is_finite(v)) top = max(top, bits_of(v) & 0x7fffffffu);
  top = __reduce_max_sync(~0u, top);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  top = __reduce_max_sync(~0u, threadIdx.x < kThreads / 32 ? tops[threadIdx.x] : 0);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    *scale = float_of(top) / kTensorMax;
  else
    atomicMax(reinterpret_cast<uint32_t*>(scale), top);
}

__global__ void finish_kernel(bool early, float* scale) {
  start(early);
  *scale = *scale / kTensorMax;
}

// ---- quantize -------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(bool early, QuantizeParams p, bool aligned) {
  start(early);
  const int64_t S = p.K / kBlock, blocks = p.R * S;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  const T* x = static_cast<const T*>(p.x);
  Block<T> block[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (const int64_t b = first + i * kThreads; b < blocks) block[i] = load_block(x + b * kBlock, aligned);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t b = first + i * kThreads;
    if (b >= blocks) return;
    const float scale = p.scale[p.per_row ? divide(b, S) : 0];
    p.sf[b] =
        quantize_block(block[i], largest(block[i]), scale, false, reinterpret_cast<uint2*>(p.packed)[b]);
  }
}

// ---- dequantize -----------------------------------------------------------------------------------

constexpr int kParallel = 4;  // 16-byte parts of the output a thread has in flight

__device__ inline uint32_t load_codes(const uint8_t* p, int bytes, bool aligned) {
  if (aligned)
    return bytes == 4 ? *reinterpret_cast<const uint32_t*>(p) : *reinterpret_cast<const uint16_t*>(p);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < bytes; ++i) codes |= static_cast<uint32_t>(p[i]) << 8 * i;
  return codes;
}

// Codes times their block's scale, exact in half precision: a code's three bits, put where a half has the
// last two of its exponent and the first of its mantissa, are the value times 2^-14.
template <int kValues>
__device__ void decode(uint32_t codes, uint32_t sf, float (&v)[kValues]) {
  const __half2 block = __float2half2_rn(e4m3_decode(sf)), unit = __float2half2_rn(0x1p14f);
  if (kValues == 4) codes = (codes & 0xff) | codes << 8;  // codes 0 1, 2 3 to the bottoms of the halves
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const uint32_t t = codes << (12 - 4 * i);  // codes i and i + kValues / 2 to the tops
    const uint32_t u = (t & 0x80008000u) | (t >> 3 & 0x0e000e00u);
    const float2 pair = __half22float2(__hmul2(__hmul2(reinterpret_cast<const __half2&>(u), unit), block));
    v[i] = pair.x;
    v[i + kValues / 2] = pair.y;
  }
}

__device__ inline void store(float* out, const float (&v)[4]) {
  *reinterpret_cast<float4*>(out) = {v[0], v[1], v[2], v[3]};
}
template <class T>
__device__ void store(T* out, const float (&v)[8]) {
  using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
  alignas(16) Pair pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, bf16>) pair[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    if constexpr (std::is_same_v<T, f16>) pair[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(out) = reinterpret_cast<const uint4&>(pair);
}

template <class T>  // a thread stores 16 bytes at a time
__global__ void __launch_bounds__(kThreads) dequantize_kernel(bool early, DequantizeParams p, bool aligned) {
  start(early);
  constexpr int kValues = 16 / sizeof(T), kParts = kBlock / kValues;
  const int64_t S = p.K / kBlock, parts = p.R * S * kParts;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kParallel + threadIdx.x;
  uint32_t codes[kParallel], sf[kParallel];
  float scale[kParallel];
#pragma unroll
  for (int i = 0; i < kParallel; ++i) {  // all loads first: the compiler moves none of them over a store
    const int64_t part = first + i * kThreads, b = part / kParts;
    if (part >= parts) break;
    codes[i] = load_codes(p.packed + part * (kValues / 2), kValues / 2, aligned);
    sf[i] = p.sf[b];
    scale[i] = p.scale[p.per_row ? divide(b, S) : 0];
  }
#pragma unroll
  for (int i = 0; i < kParallel; ++i) {
    const int64_t part = first + i * kThreads;
    if (part >= parts) return;
    float v[kValues];
    decode(codes[i], sf[i], v);
#pragma unroll
    for (int j = 0; j < kValues; ++j) v[j] *= scale[i];
    store(static_cast<T*>(p.out) + part * kValues, v);
  }
}

}  // namespace

void tensor_scale(const TensorScaleParams& p, cudaStream_t stream) {
  const int64_t ctas = std::clamp<int64_t>(ceil_div(p.count, kThreads * kBlock * 2), 1, 8 * sm_count());
  if (ctas > 1) CUDA_CHECK(cudaMemsetAsync(p.scale, 0, sizeof(float), stream));
  with_dtype(p.dtype, p.x, [&]<class T>(const T* x) {
    launch(amax_kernel<T>, {ctas, kThreads}, stream, x, p.count, aligned16(x), p.scale);
  });
  if (ctas > 1) launch(finish_kernel, {1, 1}, stream, p.scale);
}

void quantize(const QuantizeParams& p, cudaStream_t stream) {
  const int64_t ctas = ceil_div(p.R * (p.K / kBlock), kThreads * kUnroll);
  with_dtype(p.dtype, p.x, [&]<class T>(const T* x) {
    launch(quantize_kernel<T>, {ctas, kThreads}, stream, p, aligned16(x));
  });
}

void quantize_rows(const QuantizeRowsParams& p, cudaStream_t stream) {
  const QuantizedRows out{p.R, static_cast<int>(p.K / kBlock), p.packed, p.sf, p.scale, p.groups};
  with_dtype(p.dtype, p.x, [&]<class T>(const T* x) {
    quantize_all_rows(GatheredRows<T>{x, p.rows, p.T, aligned16(x)}, out, stream);
  });
}

void dequantize(const DequantizeParams& p, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.packed) % 4 == 0;
  with_dtype(p.dtype, p.out, [&]<class T>(const T*) {
    const int64_t ctas = ceil_div(p.R * p.K, 16 / sizeof(T) * kThreads * kParallel);
    launch(dequantize_kernel<T>, {ctas, kThreads}, stream, p, aligned);
  });
}

}  // namespace nvfp4::cuda
