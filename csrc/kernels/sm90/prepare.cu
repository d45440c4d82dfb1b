// Activations as the kernel's tokens: gathered, BF16 [R, Kp] in decode.cuh's order of K, Kp = K to a multiple
// of 64.
#include "decode.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace nvfp4::sm90 {
namespace {

constexpr int kWarps = 2, kWarpChunks = 16;  // a lane has half a chunk

// Half h of chunk c of a row, four 16-byte pieces: word j of piece i is the pair (k, k + 4), k = 16 j + 8 h +
// i of the chunk.
struct Half {
  uint4 piece[4];

  __device__ static Half of_values(const GemmParams& p, int64_t row, int c, int h) {
    uint4 in[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t k = c * kOrderChunk + 16 * j + 8 * h;
      in[j] = k < p.K ? *reinterpret_cast<const uint4*>(p.a + row * p.K + k) : uint4{};
    }
    Half half;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      half.set(j, {__byte_perm(in[j].x, in[j].z, 0x5410), __byte_perm(in[j].x, in[j].z, 0x7632),
                   __byte_perm(in[j].y, in[j].w, 0x5410), __byte_perm(in[j].y, in[j].w, 0x7632)});
    return half;
  }

  __device__ static Half of_codes(const GemmParams& p, int64_t row, int c, int h) {
    uint32_t codes[4];
    float scales[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t k = c * kOrderChunk + 16 * j + 8 * h, at = row * p.K + k;
      codes[j] = k < p.K ? *reinterpret_cast<const uint32_t*>(p.a_packed + at / 2) : 0;
      scales[j] = k < p.K ? e4m3_decode(p.a_sf[at / kBlock]) : 0.0f;
    }
    Half half;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float s = scales[j] * 0x1p119f;
      const uint32_t scale = to_bf16x2(s, s), by_8 = codes[j] >> 8;
      const auto value = [&](uint32_t pair) { return multiply(multiply(pair, scale), kUnitPair); };
      half.set(j, {value(pair_of<0>(codes[j], by_8)), value(pair_of<1>(codes[j], by_8)),
                   value(pair_of<2>(codes[j], by_8)), value(pair_of<3>(codes[j], by_8))});
    }
    return half;
  }
  static constexpr uint32_t kUnitPair = 0x43004300;  // kDecodedUnit

  __device__ void set(int j, const uint4& words) {
    (&piece[0].x)[j] = words.x;
    (&piece[1].x)[j] = words.y;
    (&piece[2].x)[j] = words.z;
    (&piece[3].x)[j] = words.w;
  }
};

// Lanes with four pieces each in a row become lanes with every 32nd: a store of the warp is 512 bytes then.
__device__ void turn(uint4 (&turned)[4 * 32], int lane, uint4 (&piece)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) turned[(4 * lane + i) ^ lane / 2 % 4] = piece[i];  // keeps banks apart
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) piece[i] = turned[(32 * i + lane) ^ lane / 8 % 4];
}

// A warp's part of a row of `a`, to every row of the product that reads it where `slots` says which (a row is
// read once), else of a row of the product.
template <bool packed>
__global__ void __launch_bounds__(32 * kWarps) order_kernel(GemmParams p, int chunks, int parts, bf16* out) {
  __shared__ uint4 turned[kWarps][4 * 32];
  follow();
  lead();  // not before: the product reads offsets and weights without waiting for this kernel
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x / parts;
  const int first = (blockIdx.x % parts * kWarps + warp) * kWarpChunks;
  if (first >= chunks) return;
  const int choices = p.slots ? static_cast<int>(p.R / p.a_rows) : 1;
  const auto place = [&](int j) -> int64_t {  // of the row's choice j
    if (!p.slots) return row;
    return j < choices ? p.slots[row * choices + j] : -1;
  };
  int64_t places = place(lane);
  int64_t from = row;
  if (!p.slots && p.rows) from = min(max(static_cast<int64_t>(p.rows[row]), int64_t{0}), p.a_rows - 1);
  auto [piece] = (packed ? Half::of_codes : Half::of_values)(p, from, first + lane / 2, lane % 2);
  turn(turned[warp], lane, piece);
  for (int j = 0; j < choices; ++j) {
    if (j > 0 && j % 32 == 0) places = place(j + lane);
    const int64_t to = __shfl_sync(~0u, places, j % 32);
    if (to < 0 || to >= p.R) continue;
    uint4* const pieces = reinterpret_cast<uint4*>(out + (to * chunks + first) * kOrderChunk) + lane;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + 4 * i + lane / 8 < chunks) pieces[32 * i] = piece[i];
  }
}

}  // namespace

int64_t ordered_width(int64_t K) { return (K + kOrderChunk - 1) / kOrderChunk * kOrderChunk; }

void order_tokens(const GemmParams& p, bf16* out, cudaStream_t stream) {
  const int chunks = static_cast<int>(ordered_width(p.K) / kOrderChunk),
            parts = (chunks + kWarps * kWarpChunks - 1) / (kWarps * kWarpChunks);
  const int64_t ctas = (p.slots ? p.a_rows : p.R) * parts;
  launch_after(p.a_packed ? order_kernel<true> : order_kernel<false>, static_cast<unsigned>(ctas),
               32 * kWarps, 0, stream, 1, p, chunks, parts, out);
}

}  // namespace nvfp4::sm90
