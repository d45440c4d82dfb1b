// Routing. A warp takes a token; of few tokens each is a CTA's, whose warps share the scores. Lane l sums
// experts l, l + 32, ..: the fixed order of the softmax's sum. A round of the top-k is two warp reductions,
// over the best key and the lowest index that the lanes have to offer.
#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace nvfp4::cuda {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kNever = 0;  // key of NaN and -inf, which are never chosen
constexpr int kAtOnce = 4;      // values a thread loads or looks at together
constexpr int kWarps = 4;       // and tokens of a CTA
// Up to here a CTA shares a token: E = 384, T = 1 takes 3.9 us; one warp, with E / 32 scores a lane, 6.3
// (H200).
constexpr int kFewTokens = 1024, kSharing = 256;

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

// Shared memory of a token, in words: scores and keys by expert (padded: kNever), by group, by choice.
struct Words {
  int experts, groups, chosen;
  __host__ __device__ int total() const { return 2 * experts + groups + chosen; }
};

// One token and the kThreads threads at work on it: a warp, or kSharing.
template <int kThreads>
struct Token {
  int64_t t;
  int E, thread;
  Words words;
  float *scores, *chosen;
  uint32_t *keys, *groups;

  __device__ Token(const RouteParams& p, const Words& words)
      : E(static_cast<int>(p.E)), thread(threadIdx.x % kThreads), words(words) {
    extern __shared__ uint32_t shared[];
    const int place = threadIdx.x / kThreads;
    t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + place;
    scores = reinterpret_cast<float*>(shared + place * words.total());
    keys = reinterpret_cast<uint32_t*>(scores) + words.experts;
    groups = keys + words.experts;
    chosen = reinterpret_cast<float*>(groups + words.groups);
  }
  __device__ void sync() const {
    if constexpr (kThreads > 32)
      __syncthreads();
    else
      __syncwarp();
  }
};

template <class T, int kThreads>
__device__ void load_row(const void* logits, const Token<kThreads>& a) {
  const T* row = static_cast<const T*>(logits) + a.t * a.E;
  for (int from = a.thread; from < a.E; from += kThreads * kAtOnce) {
    T x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (from + kThreads * i < a.E) x[i] = row[from + kThreads * i];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (from + kThreads * i < a.E) a.scores[from + kThreads * i] = to_float(x[i]);
  }
}

// Logits become softmax's terms, of which the sum is returned. NaN stays and has no say.
template <int kThreads>
__device__ float softmax_terms(const Token<kThreads>& a) {
  uint32_t most = kNever;
#pragma unroll kAtOnce
  for (int e = threadIdx.x % 32; e < a.E; e += 32) most = max(most, key_of(a.scores[e]));
  const float top = value_of(__reduce_max_sync(kAll, most));
  a.sync();
  for (int e = a.thread; e < a.E; e += kThreads) {
    const float x = a.scores[e];
    a.scores[e] = is_nan(x) ? x : exp32(x == top ? 0.0f : x - top);  // inf - inf counts as 0
  }
  a.sync();
  float sum = 0.0f;
#pragma unroll kAtOnce
  for (int e = threadIdx.x % 32; e < a.E; e += 32) sum += is_nan(a.scores[e]) ? 0.0f : a.scores[e];
  for (int half = 16; half; half /= 2) sum += __shfl_xor_sync(kAll, sum, half);
  a.sync();
  return sum;
}

template <Score score, int kThreads>
__device__ void make_keys(const RouteParams& p, const Token<kThreads>& a) {
  if (p.dtype == Real::f32) load_row<float>(p.logits, a);
  if (p.dtype == Real::bf16) load_row<bf16>(p.logits, a);
  if (p.dtype == Real::f16) load_row<f16>(p.logits, a);
  a.sync();
  [[maybe_unused]] float sum;
  if constexpr (score == Score::softmax) sum = softmax_terms(a);
  for (int e = a.thread; e < a.E; e += kThreads) {
    float x = a.scores[e];
    if constexpr (score == Score::softmax) x /= sum;
    if constexpr (score == Score::sigmoid) x = sigmoid32(x);
    if constexpr (score == Score::sqrt_softplus) x = sqrtf(softplus32(x));
    a.scores[e] = x;
    a.keys[e] = key_of(p.bias ? x + p.bias[e] : x);
  }
  for (int e = a.E + a.thread; e < a.words.experts; e += kThreads) a.keys[e] = kNever;
  a.sync();
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

// What a lane has to offer: its two best, so that it looks through its keys again only if it wins thrice.
struct Offer {
  uint32_t key = kAll, next_key = kNever;
  int e = -1, next_e = -1;

  // The best two after (key, e) in the order of choice.
  __device__ void search(const uint32_t* keys, int E) {
    const uint32_t last_key = key;
    const int last_e = e;
    key = next_key = kNever;
    for (int from = threadIdx.x % 32; from < E; from += 32 * kAtOnce)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = from + 32 * i;
        const uint32_t found = keys[at];
        const bool open = found < last_key || (found == last_key && at > last_e);
        const uint32_t k = open ? found : kNever;
        const bool best = k > key, second = k > next_key;
        next_e = best ? e : second ? at : next_e;
        next_key = best ? key : second ? k : next_key;
        e = best ? at : e;
        key = best ? k : key;
      }
  }
  __device__ void pop(const uint32_t* keys, int E) {
    if (next_key == kNever) return search(keys, E);
    key = next_key;
    e = next_e;
    next_key = kNever;
  }
};

template <Score score, int kThreads>
__global__ void __launch_bounds__(kSharing) route_tokens(bool early, RouteParams p, Words words) {
  start(early);
  const Token<kThreads> a(p, words);
  if (a.t >= p.T) return;
  make_keys<score>(p, a);
  if (a.thread >= 32) return;
  const int lane = a.thread;
  if (p.n_group > 1) mask_losing_groups(p, a.keys, a.groups);

  Offer mine;
  mine.search(a.keys, a.E);
  float total = 0.0f;
  for (int first = 0; first < p.top_k; first += 32) {
    const int last = min(first + 32, p.top_k);
    int id = -1;
    for (int j = first; j < last; ++j) {
      const uint32_t best = __reduce_max_sync(kAll, mine.key);
      if (best == kNever) break;
      const uint32_t e = __reduce_min_sync(kAll, mine.key == best ? static_cast<uint32_t>(mine.e) : kAll);
      if (j - first == lane) id = static_cast<int>(e);
      if (e % 32 == lane) mine.pop(a.keys, a.E);
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

template <Score score, int kThreads>
void launch_tokens(const RouteParams& p, int tokens, cudaStream_t stream) {
  constexpr int kPad = 32 * kAtOnce;
  const int experts = static_cast<int>((p.E + kPad - 1) / kPad * kPad);
  const Words words{experts, p.n_group > 1 ? p.n_group : 0, p.top_k};
  const int bytes = tokens * words.total() * 4;
  const auto kernel = route_tokens<score, kThreads>;
  if (bytes > 48 << 10)
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cuda::launch(kernel, {(p.T + tokens - 1) / tokens, dim3(tokens * kThreads), bytes}, stream, p, words);
}

template <Score score>
void launch_scores(const RouteParams& p, cudaStream_t stream) {
  if (p.T <= kFewTokens || p.E > 1024)  // a token of many experts takes much shared memory
    launch_tokens<score, kSharing>(p, 1, stream);
  else
    launch_tokens<score, 32>(p, kWarps, stream);
}

}  // namespace

void route(const RouteParams& p, cudaStream_t stream) {
  if (p.T == 0 || p.E == 0) return;
  if (p.score == Score::softmax) return launch_scores<Score::softmax>(p, stream);
  if (p.score == Score::sigmoid) return launch_scores<Score::sigmoid>(p, stream);
  launch_scores<Score::sqrt_softplus>(p, stream);
}

}  // namespace nvfp4::cuda
