// What the passes of mxfp4_to_nvfp4 leave to one another, and the search of `best` for a half block's scale.
#pragma once
#include "../mxfp4.h"
#include "device.h"
#include "kernels.h"

namespace nvfp4::cuda {

using namespace mxfp4;

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kThreads = 256;

struct alignas(16) Work {  // of one matrix; all zero at first
  Stats stats;
  int least, most;             // 256 - byte and byte + 1 of the lowest and highest exponent of a live block
  int searched;                // verbatim_search's m
  Scale scale;                 // chosen
  double errors[kCandidates];  // of `best`; while they are summed, what is known of them

  __device__ Range range() const { return {256 - least - kBias, most - 1 - kBias}; }
};

__device__ inline bool beyond_window(Range range) { return !range.empty() && !range.fits(); }
__device__ inline bool searched(Mxfp4 method, Range range) {
  return method == Mxfp4::best && beyond_window(range);
}

// Fills work[..].errors of the matrices beyond the window; `errors` has room for [E, kCandidates, N].
void sum_candidates(const Mxfp4Params& p, Work* work, double* errors, cudaStream_t stream);

// ---- `best` beyond the window ---------------------------------------------------------------------

// Squared errors by step and magnitude, in units of the block's power of two 2^k: step = a (1 + m/8) 2^i with
// alpha = a 2^q, for i = kFirst .. kLast. Scaling by a power of two commutes with every rounding here. Above,
// every code becomes 0; below, all saturate, and twice the scale is strictly better and exists: `best` takes
// no alpha whose largest step is below i = -4 for the top block.
struct ErrorTable {
  static constexpr int kFirst = -5, kLast = 4, kTicks = 8 * (kLast - kFirst + 1);
  double of[kTicks][7];
};
__device__ inline int exponent_of(float alpha) {
  return static_cast<int>(bits_of(alpha) >> 23) - 127;
}  // a normal one

__device__ inline void fill(ErrorTable& table, float alpha) {
  const double a = static_cast<double>(alpha) * two_to(-exponent_of(alpha));
  for (int i = threadIdx.x; i < ErrorTable::kTicks * 7; i += blockDim.x) {
    const int tick = i / 7, v = i % 7 + 1;
    const double step = a * (8 + tick % 8) * two_to(tick / 8 + ErrorTable::kFirst - 3), x = e2m1_decode(v);
    const double d = x - e2m1_decode(nearest(x, step)) * step;
    table.of[tick][v - 1] = d * d;
  }
}

// An e4m3 byte as 8 j + m of its value (1 + m/8) 2^(j - 9); those below 8 are subnormal.
__device__ inline int tick_of(int e4m3) {
  return e4m3 >= 8 ? e4m3 + 16 : static_cast<int>(0x161412100c080000ull >> (8 * e4m3) & 255);
}

struct Choice {
  double error;
  int e4m3;
};
__device__ inline Choice best_scale(const ErrorTable& table, uint64_t counts, int byte, float alpha) {
  const int k = byte - kBias, shift = 8 * (kLow + exponent_of(alpha) - k - ErrorTable::kFirst);
  double n[8], zeros = 0.0;
  for (int v = 1; v < 8; ++v) {
    n[v] = count_of(counts, v);
    zeros += n[v] * (e2m1_decode(v) * e2m1_decode(v));
  }
  Choice best{1e300, 0};
  for (int e4m3 = 1; e4m3 < 127; ++e4m3) {
    const int tick = tick_of(e4m3) + shift;
    if (tick < 0) continue;
    double sum = zeros;
    if (tick < ErrorTable::kTicks) {
      const double* t = table.of[tick];
      sum = n[1] * t[0] + n[2] * t[1] + n[3] * t[2] + n[4] * t[3] + n[5] * t[4] + n[6] * t[5] + n[7] * t[6];
    }
    if (sum < best.error) best = {sum, e4m3};
    if (tick >= ErrorTable::kTicks) break;  // larger scales do the same
  }
  best.error *= two_to(2 * k);
  return best;
}

}  // namespace nvfp4::cuda
