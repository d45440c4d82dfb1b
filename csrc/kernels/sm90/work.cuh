// What a product is cut into: items of (expert, weight rows, tokens), shares of them for CTAs, and a share's
// parts.
#pragma once
#include "gemm_problem.h"
#include "tile.h"

namespace nvfp4::sm90 {

struct alignas(16) Item {
  int expert, row_tile, first_row, count;  // tokens: rows first_row .. first_row + count of the product
  int tokens;  // the tile of tokens, counted over all experts, or over those of its width
};

struct alignas(16) Part {  // of an item: steps of K
  int index, begin, end;
  int share, product;  // whose part it is, of which of a layer's products (pair.cuh)
};

struct Work {  // of a CTA
  Item item;
  Part part;
};

template <class T, bool kOfPair>
struct Plan {
  const Problem& problem;
  const GemmParams& p;
  int2* first_of;  // [E + 1], in shared memory: token tiles and rows before an expert's own, or as follows

  // Where tiles have several widths, all experts' widest come first: every CTA has about as many of each, and
  // what is shared at the end is mostly of narrow ones. (The weights of an expert that has both come from
  // DRAM twice.) first_of[e] counts tiles by their narrowing, steps below the widest: 0 in x, 1 and 2 in
  // halves of y.
  static constexpr bool kSeveralWidths = T::kLeast < T::kTokens;
  static constexpr int kNarrowest = (T::kTokens - T::kLeast) / T::kStep;
  static_assert(kNarrowest <= 2);
  static_assert(3 * kMostExperts < 1 << 15);  // an expert has three narrower tiles, or they would be full

  __device__ __forceinline__ int team() const { return T::kTeam == 1 ? 1 : problem.team; }
  __device__ __forceinline__ int rank() const { return blockIdx.x % team(); }  // of this CTA there

  __device__ __forceinline__ bool first() const { return kOfPair && problem.awaits == 0; }
  __device__ __forceinline__ bool second() const { return kOfPair && problem.awaits > 0; }

  __device__ __forceinline__ int rows_before(int e) const {  // offsets may lie
    const int begin = p.offsets ? p.offsets[e] : e ? static_cast<int>(p.R) : 0;
    return min(max(begin, 0), static_cast<int>(p.R));
  }

  // first_of, by all threads: from the offsets or, where these may still be on their way, from the choices
  // they count.
  __device__ __forceinline__ void make() const {
    if constexpr (kOfPair)
      make_from_choices();
    else
      make_from_offsets();
  }

  __device__ __forceinline__ void make_from_offsets() const {
    const int E = static_cast<int>(p.E);
    for (int e = threadIdx.x; e <= E; e += T::kThreads) {
      const int begin = rows_before(e), rows = e ? max(begin - rows_before(e - 1), 0) : 0;
      if constexpr (kSeveralWidths) {
        const Cut cut(rows, tiles_of(rows));
        const auto tiles = [&](int narrowing) {
          return rows > 0 ? (cut.tiles - 1) * (cut.narrowing == narrowing) + (cut.last == narrowing) : 0;
        };
        first_of[e] = {tiles(0), tiles(1) << 16 | tiles(2)};
      } else {
        first_of[e] = {tiles_of(rows), begin};
      }
    }
    __syncthreads();
    sums([](int2 own) { return own.x; }, [](int2 own, int sum) { return int2{sum, own.y}; });
    if (kSeveralWidths)
      sums([](int2 own) { return own.y; }, [](int2 own, int sum) { return int2{own.x, sum}; });
  }

  __device__ __forceinline__ void make_from_choices() const {
    const int E = static_cast<int>(p.E), R = static_cast<int>(p.R);
    const auto expert_of = [&](int i) { return i < R ? p.ids[i] - p.first_expert : -1; };
    int64_t e = expert_of(threadIdx.x);  // on its way meanwhile
    for (int i = threadIdx.x; i <= E; i += T::kThreads) first_of[i].x = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < R; e = expert_of(i += T::kThreads))
      if (e >= 0 && e < E) atomicAdd(&first_of[e + 1].x, 1);
    __syncthreads();
    sums([](int2 own) { return own.x << 16 | tiles_of(own.x); },
         [](int2, int sum) { return int2{sum & 0xffff, sum >> 16}; });
  }

  __device__ __forceinline__ static int tiles_of(int rows) { return (rows + T::kTokens - 1) / T::kTokens; }

  struct Cut {  // of an expert's rows into tiles
    int tiles, each;
    int narrowing, last;  // the last tile's, which may have fewer rows

    __device__ __forceinline__ Cut(int rows, int tiles) : tiles(tiles), each(rows) {
      if (tiles > 1) {  // seldom while decoding, which has no time for divisions
        const int even = ((rows + tiles - 1) / tiles + 7) / 8 * 8;
        each = even > T::kTokens - T::kStep ? T::kTokens : even;  // even shares where all are narrower
      }
      narrowing = narrowing_of(each), last = narrowing_of(rows - (tiles - 1) * each);
    }
    __device__ __forceinline__ static int narrowing_of(int rows) {
      return min((T::kTokens - rows) / T::kStep, kNarrowest);
    }
  };

  // first[e] becomes to(first[e], sum of(..) up to e), by the first warp; `of` first[0] is 0. 128 at once,
  // whose latencies overlap.
  template <class Of, class To>
  __device__ __forceinline__ void sums(Of of, To to) const {
    constexpr int kAtOnce = 4;
    const int E = static_cast<int>(p.E), lane = static_cast<int>(threadIdx.x);
    if (lane >= 32) return;
    if (lane == 0) first_of[0] = to(first_of[0], 0);
    int sum = 0;
    for (int first = 1; first <= E; first += 32 * kAtOnce) {
      int2 own[kAtOnce];
      int x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int e = first + 32 * j + lane;
        own[j] = e <= E ? first_of[e] : int2{};
        x[j] = of(own[j]);
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2)
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int before = __shfl_up_sync(~0u, x[j], step);
          if (lane >= step) x[j] += before;
        }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int e = first + 32 * j + lane;
        if (e <= E) first_of[e] = to(own[j], sum + x[j]);
        sum += __shfl_sync(~0u, x[j], 31);
      }
    }
  }

  __device__ __forceinline__ static int counted(int2 first, int narrowing) {
    return narrowing == 0 ? first.x : narrowing == 1 ? first.y >> 16 : first.y & 0xffff;
  }
  __device__ __forceinline__ int items(int narrowing) const {
    return counted(first_of[p.E], narrowing) * problem.row_tiles;
  }
  __device__ __forceinline__ int items() const {
    return items(0) + (kSeveralWidths ? items(1) + items(2) : 0);
  }

  __device__ __forceinline__ Item item(int index) const {
    const int E = static_cast<int>(p.E);
    int narrowing = 0;
    if constexpr (kSeveralWidths)
      for (; narrowing < kNarrowest && index >= items(narrowing); ++narrowing) index -= items(narrowing);
    int low = 0, high = E;  // the last expert that begins at or before this item
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (counted(first_of[middle], narrowing) * problem.row_tiles <= index ? low : high) = middle;
    }
    const int2 first = first_of[low], next = first_of[low + 1];
    const int before = counted(first, narrowing), tiles = counted(next, narrowing) - before;
    const int first_row = kSeveralWidths ? rows_before(low) : first.y;
    const int rows = (kSeveralWidths ? rows_before(low + 1) : next.y) - first_row;
    const int local = index - before * problem.row_tiles;
    const Cut cut(rows, kSeveralWidths ? tiles_of(rows) : tiles);
    int row_tile = local, tile = 0;
    if (tiles > 1) tile = local % tiles, row_tile = local / tiles;
    if (kSeveralWidths && cut.narrowing != narrowing) tile = cut.tiles - 1;
    const int begin = tile * cut.each;
    return {low, row_tile * team() + rank(), first_row + begin, min(cut.each, rows - begin), before + tile};
  }

  // What a CTA computes, or a team. Items that do not fill the last wave are shared out in steps of K: what
  // is left after the whole waves but one is cut into equal runs of stages, so a run may end inside an item
  // (a head) and the next one begins there (its rest). A CTA computes its head first and leaves the
  // accumulators in memory, and takes over its neighbour's last of all, when that one is long there, or soon
  // (CTAs come up in ascending order): no K chain is broken.
  struct Share {
    int number;
    int first, stride, waves;  // items first, first + stride, .. are whole, and those
    int begin, end;            // of [begin, end) but for
    int rest, head;            // the stages before `rest` of `begin`; and `head` stages of `end`
  };
  __device__ __forceinline__ Share share(int number) const {
    const int items = this->items(), teams = problem.by_teams.divisor;
    const int stages = problem.by_stages.divisor;
    Share s{number, number, teams};
    int left;
    problem.by_teams(s.waves, left, items);
    if (s.waves > 0 && left > 0) {
      const int whole = --s.waves * teams, run = (teams + left) * stages;
      problem.by_stages(s.begin, s.rest, problem.by_teams.div(number * run));
      problem.by_stages(s.end, s.head, problem.by_teams.div((number + 1) * run));
      if (second())  // heads come first: of the experts that the first product was done with first
        s.first += teams + left;
      else
        s.begin += whole, s.end += whole;
    } else if (s.waves == 0 && number < items) {
      s.begin = number, s.end = number + 1;
    }
    return s;
  }
  __device__ __forceinline__ Share share() const { return share(blockIdx.x / team()); }

  __device__ __forceinline__ bool part(const Share& s, int n, Part& part) const {  // the n-th
    const int product = second();
    if (s.head > 0 && n-- == 0) {
      part = {s.end, 0, s.head * kStageSteps, s.number, product};
      return true;
    }
    if (n < s.waves) {
      part = {s.first + n * s.stride, 0, problem.steps, s.number, product};
      return true;
    }
    n += s.begin + (s.rest > 0) - s.waves;
    if (n < s.end) {
      part = {n, 0, problem.steps, s.number, product};
      return true;
    }
    part = {s.begin, s.rest * kStageSteps, problem.steps, s.number, product};
    return s.rest > 0 && n == s.end;
  }

  // First weight row, within the expert, of the tile's low (0) or high (1) half.
  __device__ __forceinline__ int half_row(const Item& item, int half) const {
    return item.row_tile * problem.tile_step + half * problem.half_step;
  }
};

}  // namespace nvfp4::sm90
