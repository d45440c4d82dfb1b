// tensor_scale, quantize, quantize_rows, dequantize: one block of 16 values at a time, rows over the threads.
#include <algorithm>
#include <atomic>

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

// Magnitudes of finite floats order as their bits do, so the maximum is an integer one and vectorises.
template <class T>
NVFP4_CLONES float finite_amax(const T* x, int64_t count) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t u = bits_of(to_float(x[i])) & 0x7fffffffu;
    const uint32_t finite = u < 0x7f800000u ? u : 0u;
    top = finite > top ? finite : top;
  }
  return float_of(top);
}

template <class T>
NVFP4_CLONES void quantize_row(const T* x, float scale, int64_t K, uint8_t* packed, uint8_t* sf) {
  for (int64_t s = 0; s < K / kBlock; ++s) {
    float v[kBlock];
    uint32_t top = 0;
    for (int i = 0; i < kBlock; ++i) {
      v[i] = to_float(x[s * kBlock + i]);
      const uint32_t u = bits_of(v[i]) & 0x7fffffffu;
      top = u > top ? u : top;  // NaN orders above infinity: a block that holds one has a NaN maximum
    }
    const uint32_t byte = block_scale(float_of(top), scale);
    const float step = e4m3_decode(byte) * scale;
    uint32_t code[kBlock];
    for (int i = 0; i < kBlock; ++i) code[i] = e2m1_encode(v[i], v[i] / step);
    for (int i = 0; i < kBlock / 2; ++i)
      packed[s * (kBlock / 2) + i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
    sf[s] = static_cast<uint8_t>(byte);
  }
}

struct DecodeTable {  // two codes a byte -> two floats
  float value[256][2];
  DecodeTable() {
    for (int byte = 0; byte < 256; ++byte)
      for (int half = 0; half < 2; ++half) value[byte][half] = e2m1_decode(byte >> (4 * half));
  }
};
const DecodeTable kDecode;

void store(float* out, float x) { *out = x; }
void store(bf16* out, float x) { *out = to_bf16(x); }
void store(f16* out, float x) { *out = to_f16(x); }

template <class T>
NVFP4_CLONES void dequantize_row(const uint8_t* packed, const uint8_t* sf, float scale, int64_t K, T* out) {
  for (int64_t s = 0; s < K / kBlock; ++s) {
    const float block = e4m3_decode(sf[s]);
    float v[kBlock];
    for (int i = 0; i < kBlock / 2; ++i) {
      const float* pair = kDecode.value[packed[s * (kBlock / 2) + i]];
      v[2 * i] = pair[0] * block * scale;
      v[2 * i + 1] = pair[1] * block * scale;
    }
    for (int i = 0; i < kBlock; ++i) store(out + s * kBlock + i, v[i]);
  }
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
