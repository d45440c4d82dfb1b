// What each CTA of Hopper's products computes, listed on the CPU from work.cuh's own source, run by simt.h.
// tests/test_sm90_work.py puts it before this, once as it is and once for every mistake.
namespace nvfp4::sm90 {

template <class T, bool kOfPair>
void list_parts(const Problem* problem, int2* first, int*& to) {
  const Plan<T, kOfPair> plan{*problem, problem->p, first};
  plan.make();
  __syncthreads();
  if (threadIdx.x != 0) return;
  Part own;
  const auto share = plan.share();
  for (int n = 0; plan.part(share, n, own); ++n) {
    const Item it = plan.item(own.index);
    for (int x : {static_cast<int>(blockIdx.x), n, it.expert, it.row_tile, it.first_row, it.count, it.tokens,
                  own.begin, own.end, own.share, own.product})
      *to++ = x;
  }
}

// Sizes: R, E, tiles of weight rows of a team, CTAs of a team, steps of K, CTAs, tiles awaited, the first
// expert. Returns how many numbers it wrote.
template <class T, bool kOfPair = false>
int list(const int32_t* offsets, const int32_t* ids, const int* sizes, int* parts) {
  Problem problem{};
  problem.p.offsets = offsets, problem.p.ids = ids, problem.p.first_expert = sizes[7];
  problem.p.R = sizes[0], problem.p.E = sizes[1];
  problem.row_tiles = sizes[2], problem.team = sizes[3], problem.steps = sizes[4], problem.awaits = sizes[6];
  problem.by_teams = cutlass::FastDivmod(sizes[5] / sizes[3]);
  problem.by_stages = cutlass::FastDivmod((sizes[4] + kStageSteps - 1) / kStageSteps);
  std::vector<int2> first;
  int* to = parts;
  gridDim.x = sizes[5];
  body = [&] { list_parts<T, kOfPair>(&problem, first.data(), to); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    first.assign(sizes[1] + 1, int2{-1, -1});  // memory that nobody has cleared
    run_cta(T::kThreads);
  }
  return static_cast<int>(to - parts);
}

extern "C" int run(int tokens, bool of_pair, const int32_t* offsets, const int32_t* ids, const int* sizes,
                   int* parts) {
  const auto one = tokens == 8     ? (of_pair ? list<Tile8, true> : list<Tile8>)
                   : tokens == 48  ? list<Tile48>
                   : tokens == 128 ? list<Tile128>
                                   : list<Tile256>;
  return one(offsets, ids, sizes, parts);
}

}  // namespace nvfp4::sm90
