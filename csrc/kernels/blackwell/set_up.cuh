// One launch before the GEMM: fills Groups from the offsets on the device, brings linear row scales into
// every expert's own interleaved part, zeroes the rows of no expert. Any E; no host ever reads an offset.
#pragma once
#include "../cuda/device.h"
#include "groups.h"

namespace nvfp4::blackwell {

constexpr int kSetUpThreads = 256, kSetUpWarps = kSetUpThreads / 32, kSetUpRows = 32;  // rows of a CTA

// The exclusive scan over the CTA's threads from `carry` on, which becomes the total.
template <class Op>
__device__ int scan(int mine, int& carry, Op op) {
  __shared__ int totals[kSetUpWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int through = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(~0u, through, step);
    if (lane >= step) through = op(through, lower);
  }
  int before = __shfl_up_sync(~0u, through, 1);
  __syncthreads();  // the scan before has read its totals
  if (lane == 31) totals[warp] = through;
  __syncthreads();
  int lead = carry;
  for (int w = 0; w < kSetUpWarps; ++w) {
    if (w == warp) before = lane == 0 ? lead : op(lead, before);
    lead = op(lead, totals[w]);
  }
  carry = lead;
  return before;
}

// Scales of one row, linear to interleaved; `place` counts rows from the buffer's start, 128 to an atom row.
__device__ inline void spread_scales(const GemmParams& p, int64_t r, int64_t place, uint8_t* sf) {
  const SfLayout layout{1, p.K / kBlock};
  uint8_t* to = sf + place / 128 * layout.cosize() + layout.offset(place % 128, 0);
  for (int64_t c = threadIdx.x % 32; c < layout.cols; c += 32)
    to[c / 4 * SfLayout::kAtom + c % 4] = p.a_sf[r * layout.cols + c];
}

// Every CTA walks all experts, a thread each, and keeps what concerns its own rows; the CTAs take turns in
// writing the arrays.
__global__ void __launch_bounds__(kSetUpThreads)
    set_up(GemmParams p, Groups groups, const uint8_t* sf, uint8_t* spread) {
  __shared__ int places[kSetUpRows];  // of the CTA's rows, -1: no expert's
  const int first = blockIdx.x * kSetUpRows, R = static_cast<int>(p.R), E = static_cast<int>(p.E);
  const int t = threadIdx.x;
  if (t < kSetUpRows) places[t] = -1;
  __syncthreads();
  int furthest = 0, atoms = 0;
  for (int base = 0; base < E; base += kSetUpThreads) {
    const int e = base + t;
    const Segment alone = e < E ? segment_of(p, e, 0, 0) : Segment{0, 0, 0};
    const int from =
        scan(alone.rows ? alone.begin + alone.rows : 0, furthest, [](int a, int b) { return max(a, b); });
    Segment s = e < E ? segment_of(p, e, from, 0) : alone;
    s.atom = scan(static_cast<int>(Segment::atoms(s.rows)), atoms, [](int a, int b) { return a + b; });
    if (e < E && base / kSetUpThreads % gridDim.x == blockIdx.x) groups.fill(p, sf, e, s);
    for (int r = max(s.begin, first); r < min(s.begin + s.rows, first + kSetUpRows); ++r)
      places[r - first] = static_cast<int>(s.atom) * 128 + r - s.begin;
  }
  __syncthreads();
  for (int i = t / 32; i < kSetUpRows && first + i < R; i += kSetUpWarps) {
    const int64_t r = first + i;
    if (places[i] >= 0 && spread) spread_scales(p, r, places[i], spread);
    if (places[i] < 0 && !p.leave_tail)
      for (int64_t n = 8 * (t % 32); n < p.N; n += 8 * 32)  // N is a multiple of 8
        *reinterpret_cast<uint4*>(p.out + r * p.N + n) = uint4{};
  }
}

// `spread`: SfGroups::cosize bytes for linear scales, null where p's are grouped already.
inline void launch_set_up(const GemmParams& p, const Groups& groups, uint8_t* spread, cudaStream_t stream) {
  if (spread)  // the padding: codes past the end of K are 0, and 0 * NaN is not
    CUDA_CHECK(cudaMemsetAsync(spread, 0, SfGroups::cosize(p.R, p.E, p.K / kBlock), stream));
  const auto ctas = static_cast<unsigned>((p.R + kSetUpRows - 1) / kSetUpRows);
  set_up<<<ctas, kSetUpThreads, 0, stream>>>(p, groups, spread ? spread : p.a_sf, spread);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace nvfp4::blackwell
