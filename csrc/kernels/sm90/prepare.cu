// Activations as the kernel's tokens: gathered, BF16 [R, Kp] in decode.cuh's order of K, Kp = K to a multiple
// of 64.
#include "decode.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace nvfp4::sm90 {
namespace {

constexpr int kThreads = 256, kPiece = 8;  // a thread writes 16 bytes

template <bool packed>
__global__ void __launch_bounds__(kThreads) order_kernel(GemmParams p, int64_t width, bf16* out) {
  follow();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / (width / kPiece);
  if (row >= p.R) return;
  const int64_t from = p.rows ? min(max(static_cast<int64_t>(p.rows[row]), int64_t{0}), p.a_rows - 1) : row;
  const int64_t position = i % (width / kPiece) * kPiece, chunk = position / kOrderChunk * kOrderChunk;
  alignas(16) bf16 values[kPiece];
#pragma unroll
  for (int j = 0; j < kPiece; ++j) {
    const int64_t k = chunk + k_at(static_cast<int>(position % kOrderChunk) + j);
    if (k >= p.K) {
      values[j] = {};
    } else if constexpr (packed) {
      const uint32_t code = p.a_packed[(from * p.K + k) / 2] >> k % 2 * 4 & 15;
      values[j] = to_bf16(e2m1_decode(code) * e4m3_decode(p.a_sf[(from * p.K + k) / kBlock]));
    } else {
      values[j] = p.a[from * p.K + k];
    }
  }
  *reinterpret_cast<uint4*>(out + row * width + position) = *reinterpret_cast<const uint4*>(values);
}

}  // namespace

int64_t ordered_width(int64_t K) { return (K + kOrderChunk - 1) / kOrderChunk * kOrderChunk; }

void order_tokens(const GemmParams& p, bf16* out, cudaStream_t stream) {
  const int64_t width = ordered_width(p.K), pieces = p.R * width / kPiece;
  const auto ctas = static_cast<unsigned>((pieces + kThreads - 1) / kThreads);
  launch_after(p.a_packed ? order_kernel<true> : order_kernel<false>, ctas, kThreads, 0, stream, p, width,
               out);
}

}  // namespace nvfp4::sm90
