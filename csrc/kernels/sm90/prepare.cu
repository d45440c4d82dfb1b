// Activations as the kernel's tokens: gathered, BF16 [R, Kp] in decode.cuh's order of K, Kp = K to a multiple
// of 64.
#include "../cuda/quantize_rows.cuh"
#include "decode.cuh"
#include "launch.h"
#include "ptx.cuh"

namespace nvfp4::sm90 {
namespace {

constexpr int kWarps = 2, kWarpChunks = 16;  // a lane has half a chunk

// Eight codes, a word of a block: pairs (i, i + 4) times the block's scale * 2^119, which is given twice.
__device__ uint4 decoded(uint32_t codes, uint32_t scale) {
  constexpr uint32_t kUnitPair = 0x43004300;  // kDecodedUnit
  const uint32_t by_8 = codes >> 8;
  const auto value = [&](uint32_t pair) { return multiply(multiply(pair, scale), kUnitPair); };
  return {value(pair_of<0>(codes, by_8)), value(pair_of<1>(codes, by_8)), value(pair_of<2>(codes, by_8)),
          value(pair_of<3>(codes, by_8))};
}

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
      half.set(j, decoded(codes[j], to_bf16x2(s, s)));
    }
    return half;
  }
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
__global__ void __launch_bounds__(32 * kWarps)
    order_kernel(GemmParams p, int chunks, int parts, Counts counts, bf16* out) {
  __shared__ uint4 turned[kWarps][4 * 32];
  if (p.ids) {
    if (blockIdx.x == 0) {
      for (int i = threadIdx.x; i < counts.number; i += 32 * kWarps) counts.first[i] = 0;
      __threadfence();
      __syncthreads();  // a CTA's first lead() counts for all of it
    }
    lead();  // the product reads choices and weights without waiting: they were there before permute began
  }
  follow();
  if (!p.ids) lead();  // not before: the product reads offsets and weights without waiting for this kernel
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

// Blocks of a quantized row, decoded again, where quantize_rows and order_kernel together would have put
// them.
struct OrderedRows {
  static constexpr bool kFirst = true;
  int64_t R;  // of a
  int S, chunks, choices;
  float* scale;
  const int32_t* slots;  // [R, choices], or null: row r goes to row r
  int64_t rows;          // of out
  bf16* out;

  struct Row {
    const OrderedRows& all;
    int64_t r;

    // In its chunk of four blocks this lane's is block c: word (h, i) of a lane is word c of piece (h, i).
    template <class Quantize>
    __device__ void put(int k, Quantize quantize) const {
      const int block = cuda::column(k), c = block % kBlocks;
      uint2 codes;
      const float s = e4m3_decode(quantize(codes)) * 0x1p119f;
      const uint32_t scale = to_bf16x2(s, s);
      uint4 low = decoded(codes.x, scale), high = decoded(codes.y, scale);
      const bool whole = (block | (kBlocks - 1)) < all.S;  // or K ends inside the chunk
      if (whole) low = exchanged(low, c), high = exchanged(high, c);
      for (int j = 0; j < all.choices; ++j) {
        const int64_t to = all.slots ? all.slots[r * all.choices + j] : r;
        if (to < 0 || to >= all.rows) continue;
        uint4* const chunk =
            reinterpret_cast<uint4*>(all.out + (to * all.chunks + block / kBlocks) * kOrderChunk);
        if (whole)
          chunk[c] = low, chunk[kBlocks + c] = high;
        else
          scatter(reinterpret_cast<uint32_t*>(chunk), c, low, high);
      }
    }

    static constexpr int kBlocks = kOrderChunk / kBlock;

    // Four lanes with four words each: lane c gets everyone's word c.
    __device__ static uint4 exchanged(const uint4& w, int c) {
      const uint32_t lanes = 0xfu << (threadIdx.x % 32 & ~3u);
      const bool odd = c & 1, upper = c & 2;
      const uint2 keep = upper ? uint2{w.z, w.w} : uint2{w.x, w.y},
                  give = upper ? uint2{w.x, w.y} : uint2{w.z, w.w};
      const uint2 got = {__shfl_xor_sync(lanes, give.x, 2), __shfl_xor_sync(lanes, give.y, 2)};
      const uint32_t mine = odd ? keep.y : keep.x, theirs = odd ? got.y : got.x;
      const uint32_t mate = __shfl_xor_sync(lanes, odd ? keep.x : keep.y, 1),
                     across = __shfl_xor_sync(lanes, odd ? got.x : got.y, 1);
      const uint2 near = odd ? uint2{mate, mine} : uint2{mine, mate},
                  far = odd ? uint2{across, theirs} : uint2{theirs, across};
      return upper ? uint4{far.x, far.y, near.x, near.y} : uint4{near.x, near.y, far.x, far.y};
    }

    // K has an even number of blocks: the two that are there fill the places of the others with zeros.
    __device__ static void scatter(uint32_t* chunk, int c, const uint4& low, const uint4& high) {
      const uint32_t words[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) chunk[4 * i + c] = words[i], chunk[4 * i + 2 + c] = 0;
    }
  };
  __device__ Row row(uint32_t r) const { return {*this, r}; }
};

}  // namespace

int64_t ordered_width(int64_t K) { return (K + kOrderChunk - 1) / kOrderChunk * kOrderChunk; }

void order_tokens(const GemmParams& p, Counts counts, bf16* out, cudaStream_t stream) {
  const int chunks = static_cast<int>(ordered_width(p.K) / kOrderChunk),
            parts = (chunks + kWarps * kWarpChunks - 1) / (kWarps * kWarpChunks);
  const int64_t ctas = (p.slots ? p.a_rows : p.R) * parts;
  launch_after(p.a_packed ? order_kernel<true> : order_kernel<false>, static_cast<unsigned>(ctas),
               32 * kWarps, 0, stream, 1, p, chunks, parts, counts, out);
}

void quantize_tokens(const GemmParams& p, float* scale, bf16* out, cudaStream_t stream) {
  using Source = cuda::GatheredRows<bf16>;
  const Source source{p.a, nullptr, p.a_rows, true};
  const OrderedRows to{p.a_rows,
                       static_cast<int>(p.K / kBlock),
                       static_cast<int>(ordered_width(p.K) / kOrderChunk),
                       p.slots ? static_cast<int>(p.R / p.a_rows) : 1,
                       scale,
                       p.slots,
                       p.R,
                       out};
  cuda::by_rows<Source>(to.R, to.S, [&](auto held, const cuda::Grid& grid) {
    launch_after(cuda::quantize_rows_kernel<held, Source, OrderedRows>, static_cast<unsigned>(grid.ctas),
                 grid.threads, 0, stream, 1, true, source, to);
  });
}

}  // namespace nvfp4::sm90
