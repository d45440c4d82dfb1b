// out[r, n] = sum over k of weight[e, n, k] * token[r, k], both NVFP4, by mma.sync with block scales.
//
// Weights are the M operand, as on sm_100. A persistent CTA walks tiles of (expert, weight rows, tokens); its
// eight warps copy stages of K 256 into a ring, across tiles, and multiply. Each output is one chain of
// products of K 64 in ascending K, whatever the tile: its bits depend on nothing else in the batch.
#pragma once
#include "../blackwell/launch.h"
#include "../cuda/device.h"
#include "ptx.cuh"

namespace nvfp4::blackwell {

template <int kTokens_>
struct Tile {
  static constexpr int kRows = 128, kTokens = kTokens_, kK = 256;  // of a stage; kRows of an atom of scales
  static constexpr int kRowBytes = kK / 2, kChunks = kRowBytes / 16;
  static constexpr int kStages = kTokens == 128 ? 2 : 3;  // 72 to 84 KB of the 99 a CTA may have
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kTokenWarps = kTokens > 32 ? 2 : 1, kRowWarps = kWarps / kTokenWarps;
  static constexpr int kWarpRows = kRows / kRowWarps, kWarpTokens = kTokens / kTokenWarps;
  static constexpr int kRowAtoms = kWarpRows / 16, kTokenAtoms = kWarpTokens / 8;  // products of a warp

  struct Stage {
    uint8_t weights[kRows * kRowBytes], tokens[kTokens * kRowBytes];  // chunk c of row r at c ^ r % 8
    uint8_t weights_sf[kK / 64 * SfLayout::kAtom], tokens_sf[kK / 64 * SfLayout::kAtom];  // whole atoms
  };
  struct Shared {
    Stage stages[kStages];
    uint8_t out[kWarps][8 * kWarpRows * 2];  // 8 tokens of a warp, BF16
  };
};

// A CTA's way through the tiles: numbers blockIdx.x, + gridDim.x, ..., which count experts, their weight rows
// and, fastest, their tokens, so that neighbours share weights. All lanes of a warp hold the same.
template <class T>
struct Walk {
  int index = blockIdx.x;
  int base = 0, before = 0;       // an expert, the tiles before it
  int expert, row, token, count;  // of the tile; `token` counts from the expert's first, of `count`

  // To the tile `index`; false behind the last.
  __device__ __forceinline__ bool find(const Groups& groups, int E, int row_tiles) {
    const int lane = threadIdx.x % 32;
    for (; base < E; base += 32) {
      const int rows = base + lane < E ? cute::get<1>(groups.shape[base + lane]) : 0;
      const int mine = (rows + T::kTokens - 1) / T::kTokens * row_tiles;
      int through = mine;
      for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(~0u, through, step);
        if (lane >= step) through += lower;
      }
      if (const uint32_t later = __ballot_sync(~0u, index < before + through)) {
        const int at = __ffs(static_cast<int>(later)) - 1;
        const int local = index - before - __shfl_sync(~0u, through - mine, at);
        expert = base + at;
        count = __shfl_sync(~0u, rows, at);
        const int token_tiles = (count + T::kTokens - 1) / T::kTokens;
        row = local / token_tiles * T::kRows;
        token = local % token_tiles * T::kTokens;
        return true;
      }
      before += __shfl_sync(~0u, through, 31);
    }
    return false;
  }
};

// A thread's share of the copies.
template <class T>
struct Loader {
  static constexpr int kRowStep = T::kThreads / T::kChunks;  // a thread copies a chunk of every so many rows
  static_assert(kRowStep % 8 == 0 && T::kRows % kRowStep == 0 && T::kTokens % kRowStep == 0);
  static constexpr int kHalf = T::kThreads / 2;  // of the threads bring the weights' scales
  static_assert(kHalf * 16 == sizeof(T::Stage::weights_sf) && kHalf * 16 == sizeof(T::Stage::tokens_sf));

  const Groups& groups;
  const int E, N, K;
  Walk<T> walk;
  int step = 0;  // stage of the tile
  bool more;
  const uint8_t *weights, *tokens, *sf;  // the thread's first chunk of the tile

  __device__ __forceinline__ Loader(const Groups& groups, int E, int N, int K)
      : groups(groups), E(E), N(N), K(K) {
    find();
  }

  static __device__ __forceinline__ int row() { return threadIdx.x / T::kChunks; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % T::kChunks; }

  __device__ __forceinline__ void find() {
    more = walk.find(groups, E, (N + T::kRows - 1) / T::kRows);
    if (!more) return;
    const int e = walk.expert;
    const bool second = threadIdx.x >= kHalf;
    weights = groups.weights[e] + (walk.row + row()) * static_cast<int64_t>(K / 2) + chunk() * 16;
    tokens = groups.tokens[e] + (walk.token + row()) * static_cast<int64_t>(K / 2) + chunk() * 16;
    sf = (second ? groups.tokens_sf[e] : groups.weights_sf[e]) +
         (second ? walk.token : walk.row) / SfLayout::kAtomRows * SfLayout{1, K / kBlock}.cosize() +
         threadIdx.x % kHalf * 16;
  }

  // The next stage, of this tile or of the one after it. What lies outside the operands becomes zero.
  __device__ __forceinline__ void load(typename T::Stage& stage) {
    if (more) {
      const int k = step * T::kK;
      const bool in_k = k + chunk() * 32 < K;
      const uint32_t to = row() * T::kRowBytes + (chunk() ^ row() % 8) * 16;
#pragma unroll
      for (int i = 0; i < T::kRows; i += kRowStep)
        copy_async(shared_address(stage.weights) + to + i * T::kRowBytes, weights + i * (K / 2) + k / 2,
                   in_k && walk.row + row() + i < N);
#pragma unroll
      for (int i = 0; i < T::kTokens; i += kRowStep)
        copy_async(shared_address(stage.tokens) + to + i * T::kRowBytes, tokens + i * (K / 2) + k / 2,
                   in_k && walk.token + row() + i < walk.count);
      const int atom_k = k + threadIdx.x % kHalf * 16 / SfLayout::kAtom * 64;
      copy_async(shared_address(stage.weights_sf) + threadIdx.x * 16, sf + k / 64 * SfLayout::kAtom,
                 atom_k < K);
      if (++step * T::kK >= K) {
        step = 0;
        walk.index += gridDim.x;
        find();
      }
    }
    commit_copies();  // an empty group too: groups are counted
  }
};

// A warp's part of a tile: rows row0 .. of the weights, token0 .. of the tokens.
template <class T>
struct Part {
  float sums[T::kRowAtoms][T::kTokenAtoms][4];

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int row0() { return warp() / T::kTokenWarps * T::kWarpRows; }
  static __device__ __forceinline__ int token0() { return warp() % T::kTokenWarps * T::kWarpTokens; }

  // A word of scales: of `row`, for 64 values of K.
  static __device__ __forceinline__ uint32_t scales(const uint8_t* sf, int row) {
    return load_word(shared_address(sf) + static_cast<uint32_t>(SfLayout{128, 4}.offset(row, 0)));
  }

  // `token_in_atom`: where the tile's tokens begin in their atom of scales; `columns` of scales are left from
  // this stage on. What follows the last one in its atom may be anything, and 0 * NaN is not 0.
  __device__ __forceinline__ void multiply_stage(const typename T::Stage& stage, int token_in_atom,
                                                 int columns) {
    const int low = lane() % 16, in_eight = lane() % 8, quad = lane() / 4;
    const uint32_t a_at = shared_address(stage.weights) + (row0() + low) * T::kRowBytes;
    const uint32_t b_at =
        shared_address(stage.tokens) + (token0() + in_eight + lane() / 16 * 8) * T::kRowBytes;
    const int a_chunk = lane() / 16 ^ in_eight, b_chunk = lane() / 8 % 2 ^ in_eight;
#pragma unroll
    for (int s = 0; s < T::kK / 64; ++s) {
      const uint32_t real = columns - 4 * s == 2 ? 0xffff : ~0u;  // K is a multiple of 32
      uint32_t a[T::kRowAtoms][4], sf_a[T::kRowAtoms];
#pragma unroll
      for (int i = 0; i < T::kRowAtoms; ++i) {
        load_matrices(a[i], a_at + i * 16 * T::kRowBytes + (a_chunk ^ 2 * s) * 16);
        const int row = row0() + 16 * i + quad + lane() % 2 * 8;
        sf_a[i] = scales(stage.weights_sf + s * SfLayout::kAtom, row) & real;
      }
#pragma unroll
      for (int j = 0; j < T::kTokenAtoms; j += 2) {
        uint32_t b[4];
        load_matrices(b, b_at + j * 8 * T::kRowBytes + (b_chunk ^ 2 * s) * 16);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = token_in_atom + token0() + 8 * (j + h) + quad;
          const uint32_t sf_b = scales(stage.tokens_sf + s * SfLayout::kAtom, token) & real;
#pragma unroll
          for (int i = 0; i < T::kRowAtoms; ++i)
            multiply(sums[i][j + h], a[i], b[2 * h], b[2 * h + 1], sf_a[i], sf_b);
        }
      }
    }
  }

  // Eight tokens at a time by way of `room` (8 * kWarpRows values), since a lane's sums are of neighbouring
  // tokens and out wants neighbouring columns.
  __device__ __forceinline__ void store(const Walk<T>& walk, const Groups& groups, const Epilogue& epilogue,
                                        uint8_t* room) const {
    constexpr int kPieces = T::kWarpRows / 8;  // of 16 bytes, of a token
    const int e = walk.expert, N = epilogue.N, begin = groups.begin[e], quad = lane() / 4;
    const auto place = [](int token, int piece) {  // swizzled: 8 tokens, one piece, all banks
      return (token * kPieces + (piece ^ token * kPieces / 8 % kPieces)) * 16;
    };
    const auto column = [&](int i, int h) { return min(walk.row + row0() + 16 * i + 8 * h + quad, N - 1); };
    float alpha[T::kRowAtoms][2], bias[T::kRowAtoms][2];
#pragma unroll
    for (int i = 0; i < T::kRowAtoms; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        alpha[i][h] = epilogue.alpha_of(e, column(i, h));
        bias[i][h] = epilogue.bias ? epilogue.bias_of(e, column(i, h)) : 0;
      }
    const auto finish = [&](float sum, int i, int h, float scale) {
      const float y = sum * alpha[i][h] * scale;
      return epilogue.bias ? y + bias[i][h] : y;  // without one -0 stays
    };
    const int mine = lane() / kPieces, piece = lane() % kPieces;
    const int n = walk.row + row0() + 8 * piece;
#pragma unroll
    for (int j = 0; j < T::kTokenAtoms; ++j) {
      const int first = walk.token + token0() + 8 * j;
      if (first >= walk.count) break;
      float scale[2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
        scale[c] = epilogue.scale_of(begin + min(first + lane() % 4 * 2 + c, walk.count - 1));
      uint32_t pairs[kPieces];
#pragma unroll
      for (int m = 0; m < kPieces; ++m) {
        const float* sum = sums[m / 2][j] + m % 2 * 2;
        pairs[m] = to_bf16x2(finish(sum[0], m / 2, m % 2, scale[0]), finish(sum[1], m / 2, m % 2, scale[1]));
      }
      store_transposed(shared_address(room) + place(lane() % 8, lane() / 8 % kPieces), pairs);
      __syncwarp();
      if (mine < 8 && first + mine < walk.count && n < N)
        *reinterpret_cast<uint4*>(groups.out[e] + static_cast<int64_t>(first + mine) * N + n) =
            *reinterpret_cast<const uint4*>(room + place(mine, piece));
      __syncwarp();
    }
  }
};

template <int kTokens>
__global__ void __launch_bounds__(Tile<kTokens>::kThreads, 1)
    block_scaled_gemm(const __grid_constant__ Groups groups, const __grid_constant__ Epilogue epilogue,
                      int E) {
  using T = Tile<kTokens>;
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(memory);
  const int N = epilogue.N, K = cute::get<2>(groups.shape[0]);
  Loader<T> loader(groups, E, N, K);
  for (int stage = 0; stage + 1 < T::kStages; ++stage) loader.load(shared.stages[stage]);
  int stage = 0;
  for (Walk<T> walk; walk.find(groups, E, (N + T::kRows - 1) / T::kRows); walk.index += gridDim.x) {
    Part<T> part{};
    for (int k = 0; k < K; k += T::kK) {
      wait_for_copies<T::kStages - 2>();
      __syncthreads();  // everyone's copies are here, and everyone has read the stage that is filled next
      loader.load(shared.stages[stage ? stage - 1 : T::kStages - 1]);
      part.multiply_stage(shared.stages[stage], walk.token % SfLayout::kAtomRows, (K - k) / kBlock);
      stage = stage + 1 < T::kStages ? stage + 1 : 0;
    }
    part.store(walk, groups, epilogue, shared.out[threadIdx.x / 32]);
  }
}

template <int kTokens>
void run_tile(const Launch& l, cudaStream_t stream) {
  const auto kernel = block_scaled_gemm<kTokens>;
  constexpr int bytes = sizeof(typename Tile<kTokens>::Shared);
  static_assert(bytes <= 99 * 1024);
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<l.sms, Tile<kTokens>::kThreads, bytes, stream>>>(l.groups, l.epilogue, static_cast<int>(l.E));
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace nvfp4::blackwell
