// Routing. Lane l of a warp looks after experts l, l + 32, ..: the fixed order of the softmax's sum. A token
// is a warp's, which holds its scores in registers; tokens of very many experts are a CTA's, which shares
// them. A warp makes up to 16 choices at once, from a short list; more, or where more keys qualify than the
// list holds (many ties), one after the other, by two warp reductions each.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kNever = 0;   // key of NaN and -inf, which are never chosen
constexpr int kAtOnce = 4;       // keys a lane looks at together
constexpr int kListed = 32;      // keys that are compared with one another, one a lane
constexpr int kMostChosen = 16;  // choices made from a list: with more, it would overflow too often
constexpr int kWarps = 4;        // and tokens of a CTA
constexpr int kMostHeld = 16;    // scores a lane holds: up to 512 experts
constexpr int kSharing = 256;    // threads that share a token of more

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

__device__ uint32_t bits_at(const RouteParams& p, int64_t i) {
  return p.dtype == Real::f32 ? static_cast<const uint32_t*>(p.logits)[i]
                              : static_cast<const uint16_t*>(p.logits)[i];
}
__device__ float logit_of(const RouteParams& p, uint32_t bits) {
  if (p.dtype == Real::f32) return float_of(bits);
  const auto half = static_cast<uint16_t>(bits);
  return p.dtype == Real::bf16 ? to_float(bf16{half}) : to_float(f16{half});
}

// A token's shared memory: a list of keys and their experts, scores and keys by expert (padded: kNever), keys
// by group, weights by choice.
struct Words {
  int experts, groups, chosen;
  int width;  // of a group
  __host__ __device__ int total() const { return (2 * kListed + 2 * experts + groups + chosen + 3) / 4 * 4; }
};
struct Token {
  int64_t t;
  int E;
  uint32_t *list, *listed;
  float *scores, *chosen;
  uint32_t *keys, *groups;

  __device__ Token(const RouteParams& p, const Words& words, int place, int tokens)
      : t(static_cast<int64_t>(blockIdx.x) * tokens + place), E(static_cast<int>(p.E)) {
    extern __shared__ uint4 shared[];
    list = reinterpret_cast<uint32_t*>(shared) + place * words.total();
    listed = list + kListed;
    scores = reinterpret_cast<float*>(listed + kListed);
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

// A group's `width` keys as seen by one of the 2^shift lanes at work on it, which visits every 2^shift-th.
// Teams start at different ones, so that the lanes of a warp spread over the banks.
template <class Visit>
__device__ void over_group(uint32_t* keys, int width, int shift, Visit visit) {
  const int lane = threadIdx.x % 32, team = 1 << shift;
  const int turn = width < 32 ? 0 : lane & -team;
  for (int i = lane & (team - 1); i < width; i += team) {
    const int at = i + turn;
    visit(keys[at < width ? at : at - width]);
  }
}

// Keys of the losing groups become kNever. A group's score is the sum of its two best; NaN, which is inf -
// inf, ranks first.
__device__ void mask_losing_groups(const RouteParams& p, const Token& a, int width) {
  const int lane = threadIdx.x % 32;
  int shift = 0;
  while (2 * p.n_group << shift <= 32) ++shift;
  const int teams = 32 >> shift;
  for (int from = 0; from < p.n_group; from += teams) {
    const int g = min(from + (lane >> shift), p.n_group - 1);
    uint32_t first = kNever, second = kNever;
    const auto take = [&](uint32_t key) {
      second = max(second, min(first, key));
      first = max(first, key);
    };
    over_group(a.keys + g * width, width, shift, [&](uint32_t& key) { take(key); });
    for (int step = 1; step < 1 << shift; step *= 2) {
      const uint32_t other = __shfl_xor_sync(kAll, first, step);
      second = max(second, __shfl_xor_sync(kAll, second, step));
      take(other);
    }
    const float sum = width > 1 ? value_of(first) + value_of(second) : value_of(first);
    a.groups[g] = is_nan(sum) ? kAll : key_of(sum);
  }
  __syncwarp();
  for (int g = lane >> shift; g < p.n_group; g += teams) {
    int before = 0;
    for (int h = 0; h < p.n_group; ++h)
      before += a.groups[h] > a.groups[g] || (a.groups[h] == a.groups[g] && h < g);
    if (before >= p.topk_group)
      over_group(a.keys + g * width, width, shift, [](uint32_t& key) { key = kNever; });
  }
  __syncwarp();
}

// ---- the choice -----------------------------------------------------------------------------------

// A token's scores lie in shared memory, its keys where over(visit) finds them: it visits those of a lane by
// ascending expert, all lanes together. One warp chooses. Where fewer than top_k keys can be chosen, ids are
// -1 and weights 0. choose_.. return the sum of the chosen weights, in order.

// How many of the first `count` listed are greater than the lane's own: own(m) for the m-th.
template <class Own>
__device__ int greater(const uint32_t* list, int count, const Own& own) {
  int sum = 0;
#pragma unroll
  for (int m = 0; m < count; m += 4) {
    const uint4 key = *reinterpret_cast<const uint4*>(list + m);
    sum += (key.x > own(m)) + (key.y > own(m + 1)) + (key.z > own(m + 2)) + (key.w > own(m + 3));
  }
  return sum;
}

// The least key that need be listed. k lanes' best reach the k-th best of all lanes' best: so do k keys.
template <class Over>
__device__ uint32_t least_listed(const RouteParams& p, const Token& a, const Over& over) {
  if (a.E <= kListed) return kNever + 1;
  uint32_t best = kNever;
  over([&](uint32_t key, int) { best = max(best, key); });
  a.list[threadIdx.x % 32] = best;
  __syncwarp();
  const int before = greater(a.list, 32, [&](int) { return best; });
  const uint32_t least = __reduce_min_sync(kAll, before < p.top_k ? best : kAll);
  __syncwarp();
  return max(least, kNever + 1);
}

// Lists the keys from `least` on by ascending expert. Returns how many there are, also beyond the list's end.
template <class Over>
__device__ int make_list(const Token& a, const Over& over, uint32_t least) {
  const int lane = threadIdx.x % 32;
  int count = 0;
  over([&](uint32_t key, int e) {
    const uint32_t lanes = __ballot_sync(kAll, key >= least);
    const int place = count + __popc(lanes & ((1u << lane) - 1));
    if (key >= least && place < kListed) {
      a.list[place] = key;
      a.listed[place] = e;
    }
    count += __popc(lanes);
  });
  if (lane >= count) a.list[lane] = kNever;
  __syncwarp();
  return count;
}

// A choice's place is the number of listed keys that come before it.
__device__ float choose_listed(const RouteParams& p, const Token& a, int count) {
  const int lane = threadIdx.x % 32;
  const uint32_t key = a.list[lane];
  // of equals those before this lane: x > key - 1 is x >= key, as a key to be chosen is not 0
  const int before = greater(a.list, count, [&](int m) { return m < lane ? key - 1 : key; });
  const int j = lane < count ? before : lane;
  if (j < p.top_k) {
    const int id = lane < count ? static_cast<int>(a.listed[lane]) : -1;
    p.ids[a.t * p.top_k + j] = id;
    a.chosen[j] = id < 0 ? 0.0f : a.scores[id];
  }
  __syncwarp();
  float total = 0.0f;
#pragma unroll 4
  for (int i = 0; i < p.top_k; ++i) total += a.chosen[i];
  return total;
}

// What a lane has to offer.
struct Offer {
  uint32_t key = kAll;
  int e = -1;

  template <class Over>
  __device__ void next(const Over& over) {  // the best after (key, e) in the order of choice
    const uint32_t last_key = key;
    const int last_e = e;
    key = kNever;
    over([&](uint32_t found, int at) {
      const bool open = (found < last_key) | ((found == last_key) & (at > last_e));
      const bool best = open & (found > key);
      e = best ? at : e;
      key = best ? found : key;
    });
  }
};

template <class Over>
__device__ float choose_in_turn(const RouteParams& p, const Token& a, const Over& over) {
  const int lane = threadIdx.x % 32;
  Offer mine;
  mine.next(over);
  float total = 0.0f;
  for (int first = 0; first < p.top_k; first += 32) {
    const int last = min(first + 32, p.top_k);
    int id = -1;
    for (int j = first; j < last; ++j) {
      const uint32_t best = __reduce_max_sync(kAll, mine.key);
      if (best == kNever) break;
      const uint32_t e = __reduce_min_sync(kAll, mine.key == best ? static_cast<uint32_t>(mine.e) : kAll);
      if (j - first == lane) id = static_cast<int>(e);
      if (e % 32 == lane) mine.next(over);
    }
    const float weight = id < 0 ? 0.0f : a.scores[id];
    for (int j = first; j < last; ++j) total += __shfl_sync(kAll, weight, j - first);
    if (first + lane >= last) continue;
    p.ids[a.t * p.top_k + first + lane] = id;
    a.chosen[first + lane] = weight;
  }
  return total;
}

template <class Over>
__device__ void choose(const RouteParams& p, const Token& a, const Over& over) {
  const int count = p.top_k <= kMostChosen ? make_list(a, over, least_listed(p, a, over)) : kListed + 1;
  const float total = count <= kListed ? choose_listed(p, a, count) : choose_in_turn(p, a, over);
  for (int j = threadIdx.x % 32; j < p.top_k; j += 32)
    p.weights[a.t * p.top_k + j] = (p.renormalize ? a.chosen[j] / (total + 1e-20f) : a.chosen[j]) * p.scale;
}

// ---- kernels --------------------------------------------------------------------------------------

// CTAs of a multiprocessor that registers are for; 0: the compiler's choice, or it spills on sm_100.
template <Score score, int kHeld>
constexpr int kCtas = kHeld == kMostHeld && score != Score::sqrt_softplus ? 7 : 0;

template <Score score, int kHeld>
__global__ void __launch_bounds__(32 * kWarps, kCtas<score, kHeld>)
    route_by_warp(bool early, RouteParams p, Words words) {
  const Token a(p, words, threadIdx.x / 32, blockDim.x / 32);
  start(early);
  if (a.t >= p.T) return;
  const int lane = threadIdx.x % 32;
  uint32_t bits[kHeld];  // all under way before the first is used
  float x[kHeld], bias[kHeld], share = 1.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    bits[i] = lane + 32 * i < a.E ? bits_at(p, a.t * a.E + lane + 32 * i) : 0x7fff7fffu;  // NaN by any dtype
#pragma unroll
  for (int i = 0; i < kHeld; ++i) bias[i] = p.bias && lane + 32 * i < a.E ? p.bias[lane + 32 * i] : 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] = logit_of(p, bits[i]);
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
    x[i] = score_of<score>(x[i], share);
    a.scores[lane + 32 * i] = x[i];
    keys[i] = key_of(x[i] + bias[i]);
  }
  if (p.n_group > 1) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) a.keys[lane + 32 * i] = keys[i];
    __syncwarp();
    mask_losing_groups(p, a, words.width);
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
  for (int e = threadIdx.x; e < a.E; e += kSharing) a.scores[e] = logit_of(p, bits_at(p, a.t * a.E + e));
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
  if (p.n_group > 1) mask_losing_groups(p, a, words.width);
  choose(p, a, [&](auto visit) {
    for (int from = lane; from - lane < a.E; from += 32 * kAtOnce)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) visit(a.keys[from + 32 * i], from + 32 * i);
  });
}

template <class Kernel>
void launch_tokens(Kernel kernel, const RouteParams& p, int padding, int tokens, int threads,
                   cudaStream_t stream) {
  const int experts = static_cast<int>((p.E + padding - 1) / padding * padding);
  const Words words{experts, p.n_group > 1 ? p.n_group : 0, p.top_k, static_cast<int>(p.E) / p.n_group};
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
