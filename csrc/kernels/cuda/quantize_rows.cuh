// The kernel that quantizes whole rows, for whatever yields their blocks (a Source) and wherever they go (a
// Sink).
#pragma once
#include "quantized_rows.cuh"
#include "vector.cuh"

namespace nvfp4::cuda {

// The largest of a row's `top`s; a row has blockDim.x threads, whole warps.
__device__ inline uint32_t row_max(uint32_t top) {
  __shared__ uint32_t tops[32];
  const int warps = blockDim.x / 32, first = threadIdx.y * warps, lane = threadIdx.x % 32;
  top = __reduce_max_sync(~0u, top);
  if (warps == 1) return top;
  if (lane == 0) tops[first + threadIdx.x / 32] = top;
  __syncthreads();
  return __reduce_max_sync(~0u, tops[first + min(lane, warps - 1)]);
}

template <class T>
struct GatheredRows {
  using Raw = Block<T>;
  static constexpr bool kCheap = true;
  const T* x;
  const int32_t* rows;
  int64_t count;
  bool aligned;

  struct Row {
    const T* x;
    bool aligned;
    __device__ Block<T> load(int k) const {
      return load_block(x + static_cast<int64_t>(k) * blockDim.x * kBlock, aligned);
    }
    __device__ Block<T> block(const Block<T>& b) const { return b; }
  };
  __device__ Row row(uint32_t r, uint32_t S) const {
    if (!rows) return {x + block_index(r, S) * kBlock, aligned};
    const int64_t named = rows[r];
    return {x + block_index(named < 0 ? 0 : min(named, count - 1), S) * kBlock, aligned};
  }
};

constexpr int kMostHeld = 4;
constexpr int kMostThreads = 448;
// CTAs on an SM that bound the registers; 0: the compiler's choice, which spills a few bytes on two chips.
template <int kHeld, class Source>
#if __CUDA_ARCH__ == 1000
constexpr int kFewestCtas = kHeld == 1 && !Source::kCheap ? 2 : 0;
#elif __CUDA_ARCH__ == 1200
constexpr int kFewestCtas = kHeld == kMostHeld && Source::kCheap ? 1 : 0;
#else
constexpr int kFewestCtas = 0;
#endif

// A thread holds the first kHeld of its blocks between the two passes over them; with kMostHeld more may
// follow, and those it reads twice.
template <int kHeld, class Source, class Sink>
__global__ void __launch_bounds__(kMostThreads, kFewestCtas<kHeld, Source>)
    quantize_rows_kernel(bool early, Source source, Sink out) {
  start<Sink::kFirst>(early);
  const uint32_t mine = blockIdx.x * blockDim.y + threadIdx.y;
  const uint32_t r = min(mine, static_cast<uint32_t>(out.R) - 1);  // the barrier wants all threads
  const int left = out.S - column(0);
  const auto has = [&](int k) {
    return left > static_cast<int>(k * blockDim.x) && (k < kHeld || kHeld == kMostHeld);
  };
  const auto row = source.row(r, out.S);
  typename Source::Raw raw[kHeld];
  decltype(row.block(raw[0])) held[kHeld];
  uint32_t tops[kHeld], top = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k)  // all loads first
    if (has(k)) raw[k] = row.load(k);
#pragma unroll
  for (int k = 0; k < kHeld && has(k); ++k) {
    held[k] = row.block(raw[k]);
    tops[k] = largest(held[k]);
    top = max(top, tops[k]);
  }
  if (top >= kInfinity) {
    top = 0;
#pragma unroll
    for (int k = 0; k < kHeld && has(k); ++k) top = max(top, largest_finite(held[k], tops[k]));
  }
  for (int k = kHeld; has(k); ++k) {
    const auto b = row.block(row.load(k));
    top = max(top, largest_finite(b, largest(b)));
  }
  const RowScale scale(row_scale(float_of(row_max(top))));
  if (threadIdx.x == 0) out.scale[r] = scale.scale;

  const auto to = out.row(r);
  const auto finish = [&](const auto& b, uint32_t top, int k) {
    to.put(k, [&](uint2& codes) { return quantize_block(b, top, scale, codes); });
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (has(k)) finish(held[k], tops[k], k);
  for (int k = kHeld; has(k); ++k) {
    const auto b = row.block(row.load(k));
    finish(b, largest(b), k);
  }
}

// launch(held, grid) for R rows of S blocks. Holding more blocks in fewer threads gives more loads in flight,
// fewer gives small launches more threads, and costly sources the registers they want. Measured on an H200,
// of the copy rate, with 1, 2 and 4 blocks held: swiglu_quantize 84 %, 90 % and 76 % (65536 x 7168).
template <class Source, class Launch>
void by_rows(int64_t R, int S, Launch launch) {
  if (R > INT32_MAX)
    throw std::runtime_error("nvfp4: " + std::to_string(R) + " rows, CUDA quantizes at most 2^31 - 1");
  const int fewest = S <= kMostThreads ? 1 : S <= 2 * kMostThreads ? 2 : kMostHeld;
  const int most = S <= 64 ? 1 : S <= 256 || (fewest <= 2 && !Source::kCheap) ? 2 : kMostHeld;
  const int held = R > 512 ? most : fewest;
  const int warps = std::clamp<int>(ceil_div(S, 32 * held), 1, kMostThreads / 32);
  const dim3 threads(32 * warps, std::max(1, 4 / warps));
  const Grid grid{ceil_div(R, threads.y), threads};
  if (held == 1) launch(std::integral_constant<int, 1>{}, grid);
  if (held == 2) launch(std::integral_constant<int, 2>{}, grid);
  if (held == kMostHeld) launch(std::integral_constant<int, kMostHeld>{}, grid);
}

template <class Source>
void quantize_all_rows(const Source& source, const QuantizedRows& out, cudaStream_t stream) {
  out.clear(stream);
  by_rows<Source>(out.R, out.S, [&](auto held, const Grid& grid) {
    launch(quantize_rows_kernel<held, Source, QuantizedRows>, grid, stream, source, out);
  });
}

}  // namespace nvfp4::cuda
