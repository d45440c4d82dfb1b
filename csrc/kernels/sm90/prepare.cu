// Activations as the kernel's tokens: gathered, BF16 [R, Kp] in decode.cuh's order of K, Kp = K to a multiple
// of 64.
#include "decode.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace nvfp4::sm90 {
namespace {

constexpr int kThreads = 128, kShare = kOrderChunk / 2;  // values of a thread: half the words of a chunk

// Values k .. k + 7 of a row, as BF16 pairs.
template <bool packed>
__device__ uint4 eight(const GemmParams& p, int64_t row, int64_t k) {
  if (k >= p.K) return {};
  const int64_t at = row * p.K + k;
  if constexpr (!packed) return *reinterpret_cast<const uint4*>(p.a + at);
  const uint32_t codes = *reinterpret_cast<const uint32_t*>(p.a_packed + at / 2);
  const float sf = e4m3_decode(p.a_sf[at / kBlock]);
  alignas(16) bf16 values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_bf16(e2m1_decode(codes >> 4 * i & 15) * sf);
  return *reinterpret_cast<const uint4*>(values);
}

// Half h of a chunk of 64: its 16-byte piece i holds, for c = 0..3, the pair (k, k + 4), k = 16 c + 8 h + i.
struct Half {
  uint4 piece[4];

  template <bool packed>
  __device__ static Half of(const GemmParams& p, int64_t row, int64_t begin) {
    const int64_t first = begin / kOrderChunk * kOrderChunk;
    const int h = begin % kOrderChunk != 0;
    uint4 in[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) in[c] = eight<packed>(p, row, first + 16 * c + 8 * h);
    Half half;
    uint4(&piece)[4] = half.piece;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t* const words[] = {&piece[0].x + c, &piece[1].x + c, &piece[2].x + c, &piece[3].x + c};
      *words[0] = __byte_perm(in[c].x, in[c].z, 0x5410);
      *words[1] = __byte_perm(in[c].x, in[c].z, 0x7632);
      *words[2] = __byte_perm(in[c].y, in[c].w, 0x5410);
      *words[3] = __byte_perm(in[c].y, in[c].w, 0x7632);
    }
    return half;
  }

  // Two threads, the halves of a chunk, take turns: each instruction then fills whole sectors of 32 bytes.
  __device__ void pair_up(int h) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      take_turns(h, piece[i].x, piece[i + 1].x);
      take_turns(h, piece[i].y, piece[i + 1].y);
      take_turns(h, piece[i].z, piece[i + 1].z);
      take_turns(h, piece[i].w, piece[i + 1].w);
    }
  }
  __device__ static void take_turns(int h, uint32_t& first, uint32_t& second) {
    const uint32_t given = __shfl_xor_sync(~0u, h ? first : second, 1);
    first = h ? given : first;
    second = h ? second : given;
  }

  // After pair_up: pieces 0 and 2 belong to the chunk's first half, 1 and 3 to its second.
  __device__ void store(bf16* chunk, int h) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<uint4*>(chunk + i % 2 * kShare + i / 2 * 16 + h * 8) = piece[i];
  }
};

// A thread's share of a row of `a`, to every row of the product that reads it where `slots` says which (a row
// is read once), else of a row of the product.
template <bool packed>
__global__ void __launch_bounds__(kThreads) order_kernel(GemmParams p, int64_t width, bf16* out) {
  follow();
  lead();  // not before: the product reads offsets and weights without waiting for this kernel
  const int64_t share = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t rows = p.slots ? p.a_rows : p.R, row = share / (width / kShare),
                begin = share % (width / kShare) * kShare, chunk = begin / kOrderChunk * kOrderChunk;
  const int h = begin % kOrderChunk != 0;
  int64_t from = min(row, rows - 1);  // all lanes take part in the exchange
  if (!p.slots && p.rows) from = min(max(static_cast<int64_t>(p.rows[from]), int64_t{0}), p.a_rows - 1);
  Half half = Half::of<packed>(p, from, begin);
  half.pair_up(h);
  if (row >= rows) return;
  if (!p.slots) return half.store(out + row * width + chunk, h);
  const int choices = static_cast<int>(p.R / p.a_rows);
  for (int j = 0; j < choices; ++j) {
    const int64_t to = p.slots[row * choices + j];
    if (to >= 0 && to < p.R) half.store(out + to * width + chunk, h);
  }
}

}  // namespace

int64_t ordered_width(int64_t K) { return (K + kOrderChunk - 1) / kOrderChunk * kOrderChunk; }

void order_tokens(const GemmParams& p, bf16* out, cudaStream_t stream) {
  const int64_t width = ordered_width(p.K), shares = (p.slots ? p.a_rows : p.R) * width / kShare;
  const auto ctas = static_cast<unsigned>((shares + kThreads - 1) / kThreads);
  launch_after(p.a_packed ? order_kernel<true> : order_kernel<false>, ctas, kThreads, 0, stream, p, width,
               out);
}

}  // namespace nvfp4::sm90
