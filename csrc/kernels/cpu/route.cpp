// Routing: scores, grouped top-k, and the counting sort that brings rows of one expert together.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace nvfp4::cpu {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The order of reference lane_sum: 32 lanes take every 32nd value each, then a butterfly adds the lanes.
float lane_sum(const float* x, int64_t n) {
  float lane[32] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % 32] += x[i];
  for (int half = 16; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

NVFP4_CLONES void softmax(float* s, int64_t E) {  // NaN logits keep a NaN score and take no part
  float top = kMasked;
  for (int64_t e = 0; e < E; ++e) top = s[e] > top ? s[e] : top;
  std::vector<float> term(E);
  for (int64_t e = 0; e < E; ++e) {
    const float distance = s[e] == top ? 0.0f : s[e] - top;  // inf - inf counts as 0
    term[e] = is_nan(s[e]) ? 0.0f : exp32(distance);
  }
  const float share = 1.0f / lane_sum(term.data(), E);
  for (int64_t e = 0; e < E; ++e) s[e] = is_nan(s[e]) ? kNaN : term[e] * share;
}

NVFP4_CLONES void sigmoid(float* s, int64_t E) {
  for (int64_t e = 0; e < E; ++e) s[e] = sigmoid32(s[e]);
}

NVFP4_CLONES void sqrt_softplus(float* s, int64_t E) {
  for (int64_t e = 0; e < E; ++e) s[e] = __builtin_sqrtf(softplus32(s[e]));
}

// The first `count` indices of [0, n) by descending value, ties to the lower index. A NaN, which only a
// group's score can be (inf - inf), comes first, as torch sorts.
void best(const float* value, int64_t n, int64_t count, std::vector<int32_t>& order) {
  order.resize(n);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t i, int32_t j) {
    const bool nan_i = is_nan(value[i]), nan_j = is_nan(value[j]);
    if (nan_i != nan_j) return nan_i;
    if (nan_i || value[i] == value[j]) return i < j;
    return value[i] > value[j];
  });
}

// A group's score is the sum of its two best choices; all but the topk_group best groups are masked.
void mask_losing_groups(const RouteParams& p, std::vector<float>& choice, std::vector<int32_t>& order) {
  const int64_t width = p.E / p.n_group;
  std::vector<float> group(p.n_group);
  for (int g = 0; g < p.n_group; ++g) {
    float first = kMasked, second = kMasked;
    for (int64_t e = g * width; e < (g + 1) * width; ++e) {
      const float c = choice[e];
      if (c > first) {
        second = first;
        first = c;
      } else if (c > second) {
        second = c;
      }
    }
    group[g] = width > 1 ? first + second : first;
  }
  best(group.data(), p.n_group, p.n_group, order);
  for (int i = p.topk_group; i < p.n_group; ++i)
    std::fill_n(choice.begin() + order[i] * width, width, kMasked);
}

void load_logits(const RouteParams& p, int64_t t, float* s) {
  for (int64_t e = 0; e < p.E; ++e) {
    const int64_t i = t * p.E + e;
    if (p.dtype == Real::f32) s[e] = static_cast<const float*>(p.logits)[i];
    if (p.dtype == Real::bf16) s[e] = to_float(static_cast<const bf16*>(p.logits)[i]);
    if (p.dtype == Real::f16) s[e] = to_float(static_cast<const f16*>(p.logits)[i]);
  }
}

}  // namespace

void route(const RouteParams& p) {
  parallel_for(p.T, std::max<int64_t>(1, 4096 / std::max<int64_t>(p.E, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> score(p.E), choice(p.E);
    std::vector<int32_t> order;
    for (int64_t t = begin; t < end; ++t) {
      load_logits(p, t, score.data());
      if (p.score == Score::softmax) softmax(score.data(), p.E);
      if (p.score == Score::sigmoid) sigmoid(score.data(), p.E);
      if (p.score == Score::sqrt_softplus) sqrt_softplus(score.data(), p.E);
      for (int64_t e = 0; e < p.E; ++e) {
        const float c = p.bias ? score[e] + p.bias[e] : score[e];
        choice[e] = is_nan(c) ? kMasked : c;
      }
      if (p.n_group > 1) mask_losing_groups(p, choice, order);
      best(choice.data(), p.E, p.top_k, order);

      float* weights = p.weights + t * p.top_k;
      int32_t* ids = p.ids + t * p.top_k;
      float total = 0.0f;
      for (int j = 0; j < p.top_k; ++j) {
        const bool chosen = choice[order[j]] > kMasked;
        ids[j] = chosen ? order[j] : -1;
        weights[j] = chosen ? score[order[j]] : 0.0f;
        total += weights[j];
      }
      for (int j = 0; j < p.top_k; ++j)
        weights[j] = (p.renormalize ? weights[j] / (total + 1e-20f) : weights[j]) * p.scale;
    }
  });
}

void permute(const PermuteParams& p) {
  const int64_t count = p.T * p.k;
  const auto expert = [&](int64_t i) -> int64_t {  // -1: not one of ours
    const int64_t e = p.ids[i] - p.first_expert;
    return e >= 0 && e < p.E ? e : -1;
  };
  std::fill_n(p.offsets, p.E + 1, 0);
  for (int64_t i = 0; i < count; ++i)
    if (const int64_t e = expert(i); e >= 0) ++p.offsets[e + 1];
  std::partial_sum(p.offsets, p.offsets + p.E + 1, p.offsets);

  std::vector<int32_t> next(p.offsets, p.offsets + p.E);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t e = expert(i);
    p.slots[i] = e < 0 ? -1 : next[e]++;
    if (e >= 0) p.rows[p.slots[i]] = static_cast<int32_t>(i / p.k);
  }
  std::fill(p.rows + p.offsets[p.E], p.rows + count, 0);
}

}  // namespace nvfp4::cpu
