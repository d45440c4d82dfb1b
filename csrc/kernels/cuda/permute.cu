// The stable counting sort that brings rows of one expert together. A tile of the choices is sorted by one
// CTA, whose warps take consecutive parts of it. Of parts of 32 a lane has one choice each and marks itself
// in a word by warp and expert: a choice's place is the number of marks before its own. Longer parts are
// counted, by warp and expert, and every choice finds its place among equals of its warp by a vote. Up to
// kOneTile choices are one tile and one launch; more take a first launch that leaves every tile's counts in
// the workspace.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kMostThreads = 1024;
constexpr int kWindow = 2048;           // experts counted at once; more take further passes over the choices
constexpr int kSharedWords = 11 << 10;  // of the 12 K that every chip gives without asking
constexpr int kAhead = 4;               // loads a thread has under way
// Two launches would be faster from some 1000 choices on (H200), but want a workspace, which a product that
// counts the choices beside this kernel must not be given.
constexpr int64_t kOneTile = kPermuteAlone;
constexpr int64_t kTileLeast = 512, kMostTiles = 128;

struct Plan {
  int tiles, tile, threads;  // number, choices of each, threads of its CTA
  int window, warps, part;   // experts at once; warps at work, choices of each
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan plan_of(const PermuteParams& p) {
  Plan plan;
  const int64_t count = p.T * p.k;
  plan.tiles = count <= kOneTile ? 1 : static_cast<int>(std::min(kMostTiles, ceil_div(count, kTileLeast)));
  plan.tile = static_cast<int>(ceil_div(count, plan.tiles));
  plan.window = static_cast<int>(std::clamp<int64_t>(p.E, 1, kWindow));
  const int64_t room = kSharedWords / plan.window - 1;  // one row of the shared words holds first places
  plan.warps = static_cast<int>(std::clamp<int64_t>(ceil_div(plan.tile, 32), 1, std::min<int64_t>(room, 32)));
  plan.part = static_cast<int>(ceil_div(ceil_div(plan.tile, plan.warps), 32) * 32);
  // One a choice and one an expert. Of many tiles 1024, whose registers let no two CTAs of sort_tile share a
  // multiprocessor that the kernel before leaves first: that takes longer (H200).
  const int64_t wanted = plan.tiles > kMostTiles / 2 ? kMostThreads : std::max(plan.tile, plan.window);
  plan.threads = static_cast<int>(std::clamp<int64_t>(ceil_div(wanted, 32) * 32, 128, kMostThreads));
  return plan;
}

__device__ int expert_of(const PermuteParams& p, int64_t i) {  // -1: not one of ours
  const int64_t e = p.ids[i] - p.first_expert;
  return e >= 0 && e < p.E ? static_cast<int>(e) : -1;
}

// Experts of choices `from`, `from + step`, ..: -1 from `end` on. All are under way before the first is used.
struct Experts {
  int of[kAhead];
  __device__ Experts(const PermuteParams& p, int64_t from, int64_t step, int64_t end) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) of[i] = from + i * step < end ? expert_of(p, from + i * step) : -1;
  }
};

// Counts the experts [first, first + width) among every step-th choice.
__device__ void count_choices(const PermuteParams& p, int64_t from, int64_t step, int64_t end, int64_t first,
                              int width, int* counts) {
  for (; from < end; from += kAhead * step) {
    const Experts experts(p, from, step, end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t e = experts.of[i] - first;
      if (experts.of[i] >= 0 && e >= 0 && e < width) atomicAdd(counts + e, 1);
    }
  }
}

// Sum of x over the threads before this one, and over all. A barrier lies between two calls.
__device__ int scan(int x, int& all) {
  __shared__ int warps[kMostThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += lower;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  const int of_warp = lane < blockDim.x / 32 ? warps[lane] : 0;
  all = __reduce_add_sync(kAll, of_warp);
  return __reduce_add_sync(kAll, lane < warp ? of_warp : 0) + sum - x;
}

// The choices of this CTA; the last tile may be short.
struct Range {
  int64_t begin, end;
};
__device__ Range tile_of(const PermuteParams& p, const Plan& plan) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * plan.tile;
  return {begin, min(begin + plan.tile, p.T * p.k)};
}

__global__ void __launch_bounds__(kMostThreads)
    count_tiles(bool early, PermuteParams p, Plan plan, int32_t* counts) {
  start(early);
  extern __shared__ int count[];
  const Range tile = tile_of(p, plan);
  for (int64_t first = 0; first < p.E; first += plan.window) {
    const int width = min(static_cast<int>(p.E - first), plan.window);
    for (int e = threadIdx.x; e < width; e += blockDim.x) count[e] = 0;
    __syncthreads();
    count_choices(p, tile.begin + threadIdx.x, blockDim.x, tile.end, first, width, count);
    __syncthreads();
    for (int e = threadIdx.x; e < width; e += blockDim.x) counts[blockIdx.x * p.E + first + e] = count[e];
  }
}

// starts[expert] is the tile's first place. counts[warp][expert] of the window become prefix sums over the
// warps, but marks stay what they are. Returns the number of choices in the window.
template <bool kMarks>
__device__ int place_window(const PermuteParams& p, const Plan& plan, const int32_t* tile_counts,
                            int64_t first, int width, int sorted, int* counts, int* starts) {
  int all = 0;
  for (int from = 0; from < width; from += blockDim.x) {
    const int e = from + threadIdx.x;
    if (from) __syncthreads();
    int mine = 0, before = 0;
    for (int w = 0; w < plan.warps && e < width; w += kAhead) {
      int n[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) n[i] = w + i < plan.warps ? counts[(w + i) * width + e] : 0;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (!kMarks && w + i < plan.warps) counts[(w + i) * width + e] = mine;
        mine += kMarks ? __popc(n[i]) : n[i];
      }
    }
    if (plan.tiles > 1 && e < width) {
      mine = 0;
#pragma unroll 16
      for (int tile = 0; tile < plan.tiles; ++tile) {
        const int n = tile_counts[tile * p.E + first + e];
        mine += n;
        before += tile < blockIdx.x ? n : 0;
      }
    }
    int chunk;
    const int start = sorted + all + scan(mine, chunk);
    all += chunk;
    if (e >= width) continue;
    starts[e] = start + before;
    if (blockIdx.x == 0) p.offsets[first + e] = start;
  }
  return all;
}

__device__ void scatter(const PermuteParams& p, int64_t first, int width, Range part, int* counts,
                        const int* starts) {
  const int lane = threadIdx.x % 32;
  for (int64_t from = part.begin + lane; from - lane < part.end; from += 32 * kAhead) {
    const Experts experts(p, from, 32, part.end);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int64_t i = from + 32 * ahead;
      if (i - lane >= part.end) break;
      const int expert = experts.of[ahead];
      const int64_t e = expert - first;
      const bool here = expert >= 0 && e >= 0 && e < width;
      const uint32_t equals = __match_any_sync(kAll, expert);
      const int rank = __popc(equals & ((1u << lane) - 1));
      if (here) {
        const int place = starts[e] + counts[e] + rank;
        p.slots[i] = place;
        p.rows[place] = static_cast<uint32_t>(i) / static_cast<uint32_t>(p.k);
      } else if (i < part.end && expert < 0) {
        p.slots[i] = -1;
      }
      __syncwarp();
      if (here && rank == 0) counts[e] += __popc(equals);
      __syncwarp();
    }
  }
}

// The choice of a lane whose warp has at most 32.
struct Choice {
  int64_t i;  // -1: none
  uint32_t row;
  int expert = -1;

  __device__ Choice(const PermuteParams& p, Range part) : i(part.begin + threadIdx.x % 32) {
    row = static_cast<uint32_t>(i) / static_cast<uint32_t>(p.k);
    if (i >= part.end) i = -1;
  }
  __device__ void load(const PermuteParams& p) {
    if (i >= 0) expert = expert_of(p, i);
  }
  __device__ bool in(int64_t first, int width) const { return expert >= first && expert < first + width; }

  __device__ void mark(int64_t first, int width, int* marks_of_warp) const {
    if (in(first, width)) atomicOr(marks_of_warp + expert - first, 1 << threadIdx.x % 32);
  }
  __device__ void scatter(const PermuteParams& p, int64_t first, int width, const int* marks,
                          const int* starts) const {
    if (in(first, width)) {
      const int warp = threadIdx.x / 32, *of = marks + expert - first;
      int place = starts[expert - first] + __popc(of[warp * width] & ((1u << threadIdx.x % 32) - 1));
#pragma unroll 8
      for (int w = 0; w < warp; ++w) place += __popc(of[w * width]);
      p.slots[i] = place;
      p.rows[place] = row;
    } else if (i >= 0 && expert < 0) {
      p.slots[i] = -1;
    }
  }
};

template <bool kMarks>
__global__ void __launch_bounds__(kMostThreads, 1)
    sort_tile(bool early, PermuteParams p, Plan plan, const int32_t* tile_counts) {
  extern __shared__ int shared[];
  const int warp = threadIdx.x / 32;
  const Range tile = tile_of(p, plan);
  const int64_t begin = tile.begin + warp * plan.part;
  const Range part{begin, warp < plan.warps ? min(begin + plan.part, tile.end) : begin};
  const auto clear = [&] {
    for (int i = threadIdx.x; i < plan.warps * plan.window; i += blockDim.x) shared[plan.window + i] = 0;
  };
  clear();
  Choice own(p, part);
  start<true>(early);  // the ids, which a product may count as well
  if (kMarks) own.load(p);
  int sorted = 0;
  int64_t first = 0;
  do {  // once for E = 0 too: foreign choices get their slots
    const int width = min(static_cast<int>(p.E - first), plan.window);
    int *starts = shared, *counts = shared + plan.window, *mine = counts + warp * width;
    __syncthreads();
    if constexpr (kMarks)
      own.mark(first, width, mine);
    else
      count_choices(p, part.begin + threadIdx.x % 32, 32, part.end, first, width, mine);
    __syncthreads();
    sorted += place_window<kMarks>(p, plan, tile_counts, first, width, sorted, counts, starts);
    __syncthreads();
    if constexpr (kMarks)
      own.scatter(p, first, width, counts, starts);
    else
      scatter(p, first, width, part, mine, starts);
    first += plan.window;
    if (first < p.E) {
      __syncthreads();
      clear();
    }
  } while (first < p.E);
  if (blockIdx.x == 0 && threadIdx.x == 0) p.offsets[p.E] = sorted;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x,
                thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t i = sorted + thread; i < p.T * p.k; i += step) p.rows[i] = 0;
}

}  // namespace

int64_t permute_workspace(const PermuteParams& p) {
  const int tiles = plan_of(p).tiles;
  return tiles > 1 ? tiles * p.E * 4 : 0;
}

void permute(const PermuteParams& p, void* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(p);
  int32_t* counts = static_cast<int32_t*>(workspace);
  const dim3 threads(plan.threads);
  if (plan.tiles > 1) launch(count_tiles, {plan.tiles, threads, plan.window * 4}, stream, p, plan, counts);
  launch(plan.part == 32 ? sort_tile<true> : sort_tile<false>,
         {plan.tiles, threads, (plan.warps + 1) * plan.window * 4}, stream, p, plan, counts);
}

}  // namespace nvfp4::cuda
