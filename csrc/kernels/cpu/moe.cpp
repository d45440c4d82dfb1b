// The element-wise parts of the layer: activations and the weighted sum at its end.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace nvfp4::cpu {
namespace {

constexpr int64_t kGrainValues = 1 << 14;

template <Act act>
NVFP4_CLONES void activate_row(const bf16* gate, const bf16* up, float act_alpha, float limit, int64_t I,
                               bf16* out) {
  for (int64_t i = 0; i < I; ++i)
    out[i] = to_bf16(activate<act>(to_float(gate[i]), to_float(up[i]), act_alpha, limit));
}

// One row of p.gate_up into `out` [I].
void swiglu_row(const SwigluParams& p, int64_t r, bf16* out) {
  const bf16* gate = p.gate_up + r * p.I * (p.act == Act::relu2 ? 1 : 2);
  const bf16* up = p.act == Act::relu2 ? gate : gate + p.I;
  if (p.act == Act::silu) activate_row<Act::silu>(gate, up, p.act_alpha, p.limit, p.I, out);
  if (p.act == Act::swiglu_limit) activate_row<Act::swiglu_limit>(gate, up, p.act_alpha, p.limit, p.I, out);
  if (p.act == Act::swiglu_oai) activate_row<Act::swiglu_oai>(gate, up, p.act_alpha, p.limit, p.I, out);
  if (p.act == Act::relu2) activate_row<Act::relu2>(gate, up, p.act_alpha, p.limit, p.I, out);
}

NVFP4_CLONES void add_row(const bf16* y, float weight, int64_t H, float* acc) {
  for (int64_t h = 0; h < H; ++h) acc[h] = fma32(weight, to_float(y[h]), acc[h]);
}

int64_t grain(int64_t row) { return std::max<int64_t>(1, kGrainValues / std::max<int64_t>(row, 1)); }

}  // namespace

void swiglu(const SwigluParams& p) {
  parallel_for(p.R, grain(p.I), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) swiglu_row(p, r, p.out + r * p.I);
  });
}

void swiglu_quantize(const SwigluQuantizeParams& p) {
  const SwigluParams& s = p.swiglu;
  if (p.groups.offsets) {
    std::vector<uint8_t> linear(s.R * s.I / kBlock);
    SwigluQuantizeParams plain = p;
    plain.sf = linear.data();
    plain.groups = {};
    swiglu_quantize(plain);
    return group_sf(p.groups, linear.data(), s.R, s.I / kBlock, p.sf);
  }
  parallel_for(s.R, grain(s.I), [&](int64_t begin, int64_t end) {
    std::vector<bf16> row(s.I);
    for (int64_t r = begin; r < end; ++r) {
      swiglu_row(s, r, row.data());
      quantize_row_bf16(row.data(), s.I, p.packed + r * s.I / 2, p.sf + r * s.I / kBlock, p.scale + r);
    }
  });
}

void combine(const CombineParams& p) {
  parallel_for(p.T, grain(p.H * p.k), [&](int64_t begin, int64_t end) {
    std::vector<float> acc(p.H);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(acc.begin(), acc.end(), 0.0f);
      for (int64_t j = 0; j < p.k; ++j) {
        const int64_t slot = p.slots[t * p.k + j];
        if (slot >= 0 && slot < p.R) add_row(p.y + slot * p.H, p.weights[t * p.k + j], p.H, acc.data());
      }
      for (int64_t h = 0; h < p.H; ++h) p.out[t * p.H + h] = to_bf16(acc[h]);
    }
  });
}

}  // namespace nvfp4::cpu
