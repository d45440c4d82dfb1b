// mma.sync with block scales of NVFP4, as a function that Hopper runs; lower_sm120.py puts calls of it in the
// place of the instruction. A product is summed in float32 in ascending K, like the reference; the hardware's
// order is its own.
#pragma once
#include <cstdint>

#include "../../csrc/kernels/formats.h"
#include "fragments.h"

namespace emulation {

// All lanes ask for a register (the same in all) of some lane.
__device__ inline uint32_t from(const Holder& at, const uint32_t* registers) {
  return __shfl_sync(~0u, registers[at.reg], at.lane);
}

}  // namespace emulation

extern "C" __device__ __noinline__ __attribute__((used)) float4
emulate_mma_sync(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,
                 float c1, float c2, float c3, uint32_t scales_a, uint32_t scales_b) {
  using namespace emulation;
  const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4, column = lane % 4 * 2;
  float sums[] = {c0, c1, c2, c3};
  static_assert(holder_of_d(3, 4).lane == 14 && holder_of_d(11, 5).reg == 3);
#pragma unroll
  for (int k = 0; k < 64; k += 8) {
    float rows[2][8], columns[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the rows and columns of this lane's sums
      // the register must be known at compile time, or it would have to lie in memory
      const Holder in_a = {holder_of_a(row, k).lane, holder_of_a(8 * half, k).reg, 0};
      const Holder in_b = {holder_of_b(column + half, k).lane, holder_of_b(0, k).reg, 0};
      const uint32_t row_codes = from(in_a, a), column_codes = from(in_b, b);
      const uint32_t row_scales = from(holder_of_scale_a(row + 8 * half, k), &scales_a),
                     column_scales = from(holder_of_scale_b(column + half, k), &scales_b);
      const float row_scale = nvfp4::e4m3_decode(row_scales >> k / 16 * 8 & 0x7f),
                  column_scale = nvfp4::e4m3_decode(column_scales >> k / 16 * 8 & 0x7f);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        rows[half][i] = nvfp4::e2m1_decode(row_codes >> 4 * i) * row_scale;
        columns[half][i] = nvfp4::e2m1_decode(column_codes >> 4 * i) * column_scale;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int s = 0; s < 4; ++s) sums[s] = fmaf(rows[s / 2][i], columns[s % 2][i], sums[s]);
  }
  return {sums[0], sums[1], sums[2], sums[3]};
}
