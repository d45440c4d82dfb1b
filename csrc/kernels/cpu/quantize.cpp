// tensor_scale, quantize, quantize_rows, dequantize: one block of 16 values at a time, rows over the threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"

namespace nvfp4::cpu {
namespace {

constexpr int64_t kGrainValues = 1 << 15;  // below this much work a second thread costs more than it brings

int64_t grain(int64_t K) { return std::max<int64_t>(1, kGrainValues / K); }

template <class Body>
void with_dtype(Real dtype, const void* x, Body body) {
  if (dtype == Real::f32) body(static_cast<const float*>(x));
  if (dtype == Real::bf16) body(static_cast<const bf16*>(x));
  if (dtype == Real::f16) body(static_cast<const f16*>(x));
}

// Magnitudes of finite floats order as their bits do, so the maximum is one of signed integers and
// vectorises.
template <class T>
NVFP4_CLONES float finite_amax(const T* x, int64_t count) {
  int32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t u = bits_of(to_float(x[i])) & 0x7fffffff;
    top = std::max(top, u & -static_cast<int32_t>(u < 0x7f800000));
  }
  return float_of(top);
}

// Rows are worked on in chunks, one short loop a step: loops of 16 would be unrolled before they are
// vectorised.
constexpr int kChunkBlocks = 32, kChunk = kChunkBlocks * kBlock;

// each[i] = per_block[i / 16]
void spread(const float* per_block, int64_t blocks, float* each) {
  for (int64_t s = 0; s < blocks; ++s) std::fill_n(each + s * kBlock, kBlock, per_block[s]);
}

template <class T>
NVFP4_CLONES void quantize_chunk(const T* x, float scale, int64_t blocks, uint8_t* packed, uint8_t* sf) {
  float v[kChunk], step[kChunkBlocks], steps[kChunk];
  uint8_t code[kChunk];
  const int64_t n = blocks * kBlock;
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(x[i]);
  for (int64_t s = 0; s < blocks; ++s) {
    int32_t top = 0;  // NaN orders above infinity: a block that holds one has a NaN maximum
    for (int i = 0; i < kBlock; ++i) top = std::max<int32_t>(top, bits_of(v[s * kBlock + i]) & 0x7fffffff);
    sf[s] = static_cast<uint8_t>(block_scale(float_of(top), scale));
    step[s] = e4m3_decode(sf[s]) * scale;
  }
  spread(step, blocks, steps);
  for (int64_t i = 0; i < n; ++i) code[i] = static_cast<uint8_t>(e2m1_encode(v[i], v[i] / steps[i]));
  for (int64_t i = 0; i < n / 2; ++i) packed[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
}

template <class T>
void quantize_row(const T* x, float scale, int64_t K, uint8_t* packed, uint8_t* sf) {
  for (int64_t k = 0; k < K; k += kChunk)
    quantize_chunk(x + k, scale, std::min<int64_t>(K - k, kChunk) / kBlock, packed + k / 2, sf + k / kBlock);
}

void store(float* out, float x) { *out = x; }
void store(bf16* out, float x) { *out = to_bf16(x); }
void store(f16* out, float x) { *out = to_f16(x); }

template <class T>
NVFP4_CLONES void dequantize_chunk(const uint8_t* packed, const uint8_t* sf, float scale, int64_t blocks,
                                   T* __restrict out) {
  float block[kChunkBlocks], each[kChunk];
  uint8_t code[kChunk];
  for (int64_t s = 0; s < blocks; ++s) block[s] = e4m3_decode(sf[s]);
  spread(block, blocks, each);
  for (int64_t i = 0; i < blocks * kBlock / 2; ++i) {
    code[2 * i] = packed[i] & 15;
    code[2 * i + 1] = packed[i] >> 4;
  }
  for (int64_t i = 0; i < blocks * kBlock; ++i) store(out + i, e2m1_decode(code[i]) * each[i] * scale);
}

template <class T>
void dequantize_row(const uint8_t* packed, const uint8_t* sf, float scale, int64_t K, T* out) {
  for (int64_t k = 0; k < K; k += kChunk)
    dequantize_chunk(packed + k / 2, sf + k / kBlock, scale, std::min<int64_t>(K - k, kChunk) / kBlock,
                     out + k);
}

}  // namespace

void tensor_scale(const TensorScaleParams& p) {
  std::atomic<uint32_t> top{0};
  with_dtype(p.dtype, p.x, [&](auto* x) {
    parallel_for(p.count, kGrainValues, [&](int64_t begin, int64_t end) {
      const uint32_t mine = bits_of(finite_amax(x + begin, end - begin));
      uint32_t seen = top.load();
      while (mine > seen && !top.compare_exchange_weak(seen, mine)) {
      }
    });
  });
  *p.scale = float_of(top.load()) / kTensorMax;
}

void quantize(const QuantizeParams& p) {
  with_dtype(p.dtype, p.x, [&](auto* x) {
    parallel_for(p.R, grain(p.K), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        quantize_row(x + r * p.K, p.scale[p.per_row ? r : 0], p.K, p.packed + r * p.K / 2,
                     p.sf + r * p.K / kBlock);
    });
  });
}

void quantize_rows(const QuantizeRowsParams& p) {
  if (p.groups.offsets) {  // linear first: nothing here is fast on a CPU that lacks those tensor cores
    std::vector<uint8_t> linear(p.R * p.K / kBlock);
    QuantizeRowsParams plain = p;
    plain.sf = linear.data();
    plain.groups = {};
    quantize_rows(plain);
    return group_sf(p.groups, linear.data(), p.R, p.K / kBlock, p.sf);
  }
  with_dtype(p.dtype, p.x, [&](auto* x) {
    parallel_for(p.R, grain(p.K), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t source = p.rows ? std::clamp<int64_t>(p.rows[r], 0, p.T - 1) : r;
        const auto* row = x + source * p.K;
        p.scale[r] = row_scale(finite_amax(row, p.K));
        quantize_row(row, p.scale[r], p.K, p.packed + r * p.K / 2, p.sf + r * p.K / kBlock);
      }
    });
  });
}

void quantize_row_bf16(const bf16* x, int64_t K, uint8_t* packed, uint8_t* sf, float* scale) {
  *scale = row_scale(finite_amax(x, K));
  quantize_row(x, *scale, K, packed, sf);
}

void dequantize(const DequantizeParams& p) {
  with_dtype(p.dtype, p.out, [&](auto* dtype_tag) {
    auto* out = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(dtype_tag)>>*>(dtype_tag);
    parallel_for(p.R, grain(p.K), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        dequantize_row(p.packed + r * p.K / 2, p.sf + r * p.K / kBlock, p.scale[p.per_row ? r : 0], p.K,
                       out + r * p.K);
    });
  });
}

}  // namespace nvfp4::cpu
