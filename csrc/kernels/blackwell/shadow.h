// The shadow executor: takes what the CUTLASS launch takes and multiplies with scalar loops through the same
// CuTe layouts. What it gets wrong, the set-up got wrong. For tests, on the CPU and on any GPU.
#pragma once
#include "groups.h"

namespace nvfp4::blackwell {

// One sum of expert e: column n of the weights, `row` of the expert's tokens.
NVFP4_HD float shadow_sum(const Groups& g, int64_t e, int n, int row) {
  const auto value = [](const uint8_t* codes, int64_t at, const uint8_t* sf, int64_t sf_at) {
    return e2m1_decode(codes[at / 2] >> 4 * (at % 2)) * e4m3_decode(sf[sf_at]);
  };
  const int K = cute::get<2>(g.shape[e]);
  float acc = 0;
  for (int k = 0; k < K; ++k) {
    const int64_t w = n * cute::get<0>(g.weights_stride[e]) + k,
                  t = row * cute::get<0>(g.tokens_stride[e]) + k;
    acc += value(g.weights[e], w, g.weights_sf[e], g.weights_blocks[e](cute::make_coord(n, k, 0))) *
           value(g.tokens[e], t, g.tokens_sf[e], g.tokens_blocks[e](cute::make_coord(row, k, 0)));
  }
  return acc;
}

// And what becomes of it in D.
NVFP4_HD void shadow_value(const Groups& g, const Epilogue& epilogue, int64_t e, int n, int row) {
  const int r = g.begin[e] + row;
  float y = shadow_sum(g, e, n, row) * epilogue.alpha_of(e, n) * epilogue.scale_of(r);
  if (epilogue.bias) y += epilogue.bias_of(e, n);
  g.out[e][n + row * cute::get<1>(g.out_stride[e])] = to_bf16(y);
}

}  // namespace nvfp4::blackwell
