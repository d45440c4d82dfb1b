// `best` beyond the window: what each candidate for alpha would lose, in float64 and in one order.
#include "mxfp4.cuh"

namespace nvfp4::cuda {
namespace {

__device__ double lane_sum(double x) {
  for (int half = 16; half; half /= 2) x += __shfl_xor_sync(kAll, x, half);
  return x;
}

// The candidates in turn: first the largest power of two that keeps the topmost exponents, which loses little
// as a rule; then the others, each until it has lost more than that one did.
struct Candidates {
  int first, count;

  __device__ int matrix(unsigned which) const { return static_cast<int>(which) / count; }
  __device__ int of(unsigned which) const { return first + static_cast<int>(which) % count; }
};
constexpr Candidates kFirst{0, 1}, kOthers{1, kCandidates - 1};

// A sum beyond it is not the least, in whatever order it was taken.
__device__ double enough(const Work& work, Candidates some) {
  return some.first == 0 ? 1e300 : work.errors[0] * (1 + 0x1p-20);
}

// errors[e][i][row]: numbers.lane_sum over the row's half blocks; their sum, in any order, in work. CTAs of a
// matrix and candidate take its rows in turn; a warp has a row.
__global__ void __launch_bounds__(kThreads, 4)
    sum_row_errors(Mxfp4Params p, Work* work, double* errors, Candidates some, unsigned ctas) {
  __shared__ ErrorTable table;
  const int which = blockIdx.x / ctas, e = some.matrix(which), i = some.of(which), lane = threadIdx.x % 32;
  const Range range = work[e].range();
  if (!searched(p.method, range)) return;
  const Scale scale = candidate(work[e].stats, range, i);
  fill(table, scale.alpha);
  __syncthreads();
  const double most = enough(work[e], some);
  double& lost = work[e].errors[i];
  const uint64_t* codes = reinterpret_cast<const uint64_t*>(p.packed) + e * p.N * p.K / 16;
  const uint8_t* bytes = p.e8m0 + e * p.N * p.K / 32;
  constexpr int kRows = kThreads / 32;
  for (int64_t row = blockIdx.x % ctas * kRows + threadIdx.x / 32; row < p.N; row += ctas * kRows) {
    if (__any_sync(kAll, *const_cast<volatile double*>(&lost) > most)) return;
    double sum = 0.0;
    for (int64_t s = row * p.K / 16 + lane; s < (row + 1) * p.K / 16; s += 32) {
      const int byte = bytes[s / 2];
      if (kept_scale(p.method, scale, byte) != kQuantize) continue;
      const uint64_t half = codes[s];
      if (!is_zero(half)) sum += best_scale(table, count_magnitudes(half), byte, scale.alpha).error;
    }
    sum = lane_sum(sum);
    if (lane > 0) continue;
    errors[(e * kCandidates + i) * p.N + row] = sum;
    atomicAdd(&lost, sum);
  }
}

// numbers.lane_sum over the rows, by one warp, where all were summed.
__global__ void sum_errors(Mxfp4Params p, Work* work, const double* errors, Candidates some) {
  const int e = some.matrix(blockIdx.x), i = some.of(blockIdx.x);
  if (!searched(p.method, work[e].range()) || work[e].errors[i] > enough(work[e], some)) return;
  double total = 0.0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < p.N; row += 32) total += errors[(e * kCandidates + i) * p.N + row];
  total = lane_sum(total);
  if (threadIdx.x == 0) work[e].errors[i] = total;
}

}  // namespace

void sum_candidates(const Mxfp4Params& p, Work* work, double* errors, cudaStream_t stream) {
  for (const Candidates some : {kFirst, kOthers}) {
    const unsigned sums = static_cast<unsigned>(p.E) * some.count, ctas = 1 + 8 * sm_count() / sums;
    sum_row_errors<<<sums * ctas, kThreads, 0, stream>>>(p, work, errors, some, ctas);
    sum_errors<<<sums, 32, 0, stream>>>(p, work, errors, some);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace nvfp4::cuda
