// Routing. Lane l of a warp looks after experts l, l + 32, ..: the fixed order of the softmax's sum. A token
// is a warp's, which holds its scores in registers; tokens of very many experts are a CTA's, which shares
// them. A round of the top-k is two warp reductions, over the best key and the lowest index that the lanes
// have to offer.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kNever = 0;  // key of NaN and -inf, which are never chosen
constexpr int kAtOnce = 4;      // keys a lane looks at together
constexpr int kWarps = 4;       // and tokens of a CTA
constexpr int kMostHeld = 16;   // scores a lane holds: up to 512 experts
constexpr int kSharing = 256;   // threads that share a token of more

// Ascending with x; -0 and 0 share a key, so that their tie goes to the lower index.
__device__ uint32_t key_of(float x) {
  const uint32_t u = bits_of(x + 0.0f);
  const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(u) >> 31) | 0x80000000u;
  return x > float_of(0xff800000u) ? u ^ flip : kNever;
}
__device__ float value_of(uint32_t key) {
  if (key == kNever) return float_of(0xff800000u);
  return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ float logit(const RouteParams& p, int64_t i) {
  if (p.dtype == Real::f32) return static_cast<const float*>(p.logits)[i];
  if (p.dtype == Real::bf16) return to_float(static_cast<const bf16*>(p.logits)[i]);
  return to_float(static_cast<const f16*>(p.logits)[i]);
}

// A token's shared memory: scores and keys by expert (padded: kNever), keys by group, weights by choice.
struct Words {
  int experts, groups, chosen;
  __host__ __device__ int total() const { return 2 * experts + groups + chosen; }
};
struct Token {
  int64_t t;
  int E;
  float *scores, *chosen;
  uint32_t *keys, *groups;

  __device__ Token(const RouteParams& p, const Words& words, int place, int tokens)
      : t(static_cast<int64_t>(blockIdx.x) * tokens + place), E(static_cast<int>(p.E)) {
    extern __shared__ uint32_t shared[];
    scores = reinterpret_cast<float*>(shared + place * words.total());
    keys = reinterpret_cast<uint32_t*>(scores) + words.experts;
    groups = keys + words.experts;
    chosen = reinterpret_cast<float*>(groups + words.groups);
  }
};

// ---- scores ---------------------------------------------------------------------------------------

// A softmax's term; NaN stays and has no say. inf - inf counts as 0.
__device__ float term(float x, float top) { return exp32(x == top ? 0.0f : x - top); }
__device__ float warp_top(float lanes) { return value_of(__reduce_max_sync(kAll, key_of(lanes))); }
__device__ float warp_sum(float sum) {
  for (int half = 16; half; half /= 2) sum += __shfl_xor_sync(kAll, sum, half);
  return sum;
}
__device__ float said(float term) { return is_nan(term) ? 0.0f : term; }

// From a logit, or a softmax's term and its share.
template <Score score>
__device__ float score_of(float x, float share) {
  if (score == Score::softmax) return x * share;
  if (score == Score::sigmoid) return sigmoid32(x);
  return sqrt32(softplus32(x));
}

// A group's `width` keys as seen by one of the `team` lanes at work on it, which visits every team-th. Groups
// start at different ones, so that the lanes of a warp spread over the banks.
template <class Visit>
__device__ void over_group(uint32_t* keys, int g, int width, int team, Visit visit) {
  const int turn = g * team % width;
  for (int i = threadIdx.x % team; i < width; i += team) {
    const int at = i + turn;
    visit(keys[g * width + (at < width ? at : at - width)]);
  }
}

// Keys of the losing groups become kNever. A group's score is the sum of its two best; NaN, which is inf -
// inf, ranks first.
__device__ void mask_losing_groups(const RouteParams& p, uint32_t* keys, uint32_t* group) {
  const int width = static_cast<int>(p.E) / p.n_group, lane = threadIdx.x % 32;
  int team = 1;
  while (2 * team * p.n_group <= 32) team *= 2;
  for (int from = 0; from < p.n_group; from += 32 / team) {
    const int g = min(from + lane / team, p.n_group - 1);
    uint32_t first = kNever, second = kNever;
    const auto take = [&](uint32_t key) {
      second = max(second, min(first, key));
      first = max(first, key);
    };
    over_group(keys, g, width, team, [&](uint32_t& key) { take(key); });
    for (int step = 1; step < team; step *= 2) {
      const uint32_t other = __shfl_xor_sync(kAll, first, step);
      second = max(second, __shfl_xor_sync(kAll, second, step));
      take(other);
    }
    const float sum = width > 1 ? value_of(first) + value_of(second) : value_of(first);
    group[g] = is_nan(sum) ? kAll : key_of(sum);
  }
  __syncwarp();
  for (int from = lane / team; from < p.n_group; from += 32 / team) {
    int before = 0;
    for (int h = 0; h < p.n_group; ++h)
      before += group[h] > group[from] || (group[h] == group[from] && h < from);
    if (before >= p.topk_group) over_group(keys, from, width, team, [](uint32_t& key) { key = kNever; });
  }
  __syncwarp();
}

// ---- the choice -----------------------------------------------------------------------------------

// What a lane has to offer: its two best, so that it looks through its keys again only if it wins thrice.
struct Offer {
  uint32_t key = kAll, next_key = kNever;
  int e = -1, next_e = -1;

  // The best two after (key, e) in the order of choice; over(visit) visits keys by ascending expert.
  template <class Over>
  __device__ void search(const Over& over) {
    const uint32_t last_key = key;
    const int last_e = e;
    key = next_key = kNever;
    over([&](uint32_t found, int at) {
      const bool open = found < last_key || (found == last_key && at > last_e);
      const uint32_t k = open ? found : kNever;
      const bool best = k > key, second = k > next_key;
      next_e = best ? e : second ? at : next_e;
      next_key = best ? key : second ? k : next_key;
      e = best ? at : e;
      key = best ? k : key;
    });
  }
  template <class Over>
  __device__ void pop(const Over& over) {
    if (next_key == kNever) return search(over);
    key = next_key;
    e = next_e;
    next_key = kNever;
  }
};

// One warp chooses. A token's scores lie in shared memory, its keys where over() finds them.
template <class Over>
__device__ void choose(const RouteParams& p, const Token& a, const Over& over) {
  const int lane = threadIdx.x % 32;
  Offer mine;
  mine.search(over);
  float total = 0.0f;
  for (int first = 0; first < p.top_k; first += 32) {
    const int last = min(first + 32, p.top_k);
    int id = -1;
    for (int j = first; j < last; ++j) {
      const uint32_t best = __reduce_max_sync(kAll, mine.key);
      if (best == kNever) break;
      const uint32_t e = __reduce_min_sync(kAll, mine.key == best ? static_cast<uint32_t>(mine.e) : kAll);
      if (j - first == lane) id = static_cast<int>(e);
      if (e % 32 == lane) mine.pop(over);
    }
    const float weight = id < 0 ? 0.0f : a.scores[id];
    for (int j = first; j < last; ++j) total += __shfl_sync(kAll, weight, j - first);
    if (first + lane >= last) continue;
    p.ids[a.t * p.top_k + first + lane] = id;
    a.chosen[first + lane] = weight;
  }
  for (int j = lane; j < p.top_k; j += 32)
    p.weights[a.t * p.top_k + j] = (p.renormalize ? a.chosen[j] / (total + 1e-20f) : a.chosen[j]) * p.scale;
}

// ---- kernels --------------------------------------------------------------------------------------

template <Score score, int kHeld>
__global__ void __launch_bounds__(32 * kWarps, kHeld == kMostHeld ? 7 : 0)
    route_by_warp(bool early, RouteParams p, Words words) {
  start(early);
  const Token a(p, words, threadIdx.x / 32, blockDim.x / 32);
  if (a.t >= p.T) return;
  const int lane = threadIdx.x % 32;
  float x[kHeld], share = 1.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    x[i] = lane + 32 * i < a.E ? logit(p, a.t * a.E + lane + 32 * i) : float_of(0x7fc00000u);
  if constexpr (score == Score::softmax) {
    float top = float_of(0xff800000u), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) top = fmaxf(top, x[i]);  // of a NaN and a number, the number
    top = warp_top(top);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = term(x[i], top);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) sum += said(x[i]);
    share = reciprocal_inside(warp_sum(sum));  // at least 1: that of the top itself
  }
  uint32_t keys[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = lane + 32 * i;
    x[i] = score_of<score>(x[i], share);
    a.scores[e] = x[i];
    keys[i] = key_of(p.bias && e < a.E ? x[i] + p.bias[e] : x[i]);
  }
  if (p.n_group > 1) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) a.keys[lane + 32 * i] = keys[i];
    __syncwarp();
    mask_losing_groups(p, a.keys, a.groups);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) keys[i] = a.keys[lane + 32 * i];
  }
  __syncwarp();
  choose(p, a, [&](auto visit) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) visit(keys[i], lane + 32 * i);
  });
}

template <Score score>
__global__ void __launch_bounds__(kSharing) route_by_cta(bool early, RouteParams p, Words words) {
  start(early);
  const Token a(p, words, 0, 1);
  const int lane = threadIdx.x % 32;
  for (int e = threadIdx.x; e < a.E; e += kSharing) a.scores[e] = logit(p, a.t * a.E + e);
  __syncthreads();
  float share = 1.0f;
  if constexpr (score == Score::softmax) {  // every warp finds top and sum for itself
    float top = float_of(0xff800000u), sum = 0.0f;
    for (int e = lane; e < a.E; e += 32) top = fmaxf(top, a.scores[e]);
    top = warp_top(top);
    __syncthreads();
    for (int e = threadIdx.x; e < a.E; e += kSharing) a.scores[e] = term(a.scores[e], top);
    __syncthreads();
    for (int e = lane; e < a.E; e += 32) sum += said(a.scores[e]);
    share = reciprocal_inside(warp_sum(sum));
    __syncthreads();
  }
  for (int e = threadIdx.x; e < words.experts; e += kSharing) {
    const float x = e < a.E ? score_of<score>(a.scores[e], share) : float_of(0x7fc00000u);
    if (e < a.E) a.scores[e] = x;
    a.keys[e] = key_of(p.bias && e < a.E ? x + p.bias[e] : x);
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  if (p.n_group > 1) mask_losing_groups(p, a.keys, a.groups);
  choose(p, a, [&](auto visit) {
    for (int from = lane; from < a.E; from += 32 * kAtOnce)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) visit(a.keys[from + 32 * i], from + 32 * i);
  });
}

template <class Kernel>
void launch_tokens(Kernel kernel, const RouteParams& p, int padding, int tokens, int threads,
                   cudaStream_t stream) {
  const int experts = static_cast<int>((p.E + padding - 1) / padding * padding);
  const Words words{experts, p.n_group > 1 ? p.n_group : 0, p.top_k};
  const int bytes = tokens * words.total() * 4;
  if (bytes > 48 << 10)
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cuda::launch(kernel, {(p.T + tokens - 1) / tokens, dim3(threads), bytes}, stream, p, words);
}

template <Score score, int kHeld = 1>
void launch_scores(const RouteParams& p, cudaStream_t stream) {
  if constexpr (kHeld <= kMostHeld) {
    if (p.E > 32 * kHeld) return launch_scores < score, kHeld<4 ? 2 * kHeld : kHeld + 4>(p, stream);
    const int warps = p.T <= sm_count() ? 1 : kWarps;
    launch_tokens(route_by_warp<score, kHeld>, p, 32 * kHeld, warps, 32 * warps, stream);
  } else {
    launch_tokens(route_by_cta<score>, p, 32 * kAtOnce, 1, kSharing, stream);
  }
}

}  // namespace

void route(const RouteParams& p, cudaStream_t stream) {
  if (p.T == 0 || p.E == 0) return;
  if (p.score == Score::softmax) return launch_scores<Score::softmax>(p, stream);
  if (p.score == Score::sigmoid) return launch_scores<Score::sigmoid>(p, stream);
  launch_scores<Score::sqrt_softplus>(p, stream);
}

}  // namespace nvfp4::cuda
