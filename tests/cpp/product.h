// A grouped product's operands as the Python tests hand them over.
#pragma once
#include "../../csrc/kernels/params.h"
#include "simt.h"

namespace nvfp4 {

// Addresses: a, a_sf, a_scale, b, b_sf, alpha, bias, offsets, out; sizes: R, N, K, E, alphas, scales of a,
// whether threads take turns backwards.
inline GemmParams product_of(void** at, const int64_t* sizes) {
  GemmParams p{};
  p.a_packed = static_cast<uint8_t*>(at[0]), p.a_sf = static_cast<uint8_t*>(at[1]);
  p.a_scale = static_cast<float*>(at[2]), p.a_scale_per_row = sizes[5] != 1;
  p.b = static_cast<uint8_t*>(at[3]), p.b_sf = static_cast<uint8_t*>(at[4]);
  p.alpha = static_cast<float*>(at[5]), p.bias = static_cast<float*>(at[6]);
  p.offsets = static_cast<int32_t*>(at[7]), p.out = static_cast<bf16*>(at[8]);
  p.R = sizes[0], p.N = sizes[1], p.K = sizes[2], p.E = sizes[3], p.alphas = sizes[4];
  simt::backwards = sizes[6];
  return p;
}

}  // namespace nvfp4
