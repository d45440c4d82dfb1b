// mxfp4_to_nvfp4. The first pass reads exponents and, of the codes, only blocks that would widen the range
// known so far or raise the maximum; a tensor that loses nothing is then read and written once. The other
// passes are launched where the method may need them and leave at once for matrices that don't: nobody waits
// for the device to say. csrc/kernels/mxfp4.h has the arithmetic.
#include <algorithm>

#include "../mxfp4.h"
#include "device.h"
#include "kernels.h"

namespace nvfp4::cuda {
namespace {

using namespace mxfp4;

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kEach = 4;                  // blocks of 32 values a thread converts
constexpr int kChunk = kThreads * kEach;  // a CTA
constexpr int kAhead = 16;                // exponents a thread has under way: 64 dependent loads else
constexpr float kFloatMax = 0x1.fffffep+127f;
constexpr int kLongChunk = 16 * kChunk;  // or counts; the sums of squares fit 32 bits

struct alignas(16) Work {  // of one matrix; all zero at first
  Stats stats;
  int least, most;  // 256 - byte and byte + 1 of the lowest and highest exponent of a live block
  int searched;     // verbatim_search's m
  double errors[kCandidates];

  __device__ Range range() const { return {256 - least - kBias, most - 1 - kBias}; }
};

__device__ bool beyond_window(Range range) { return !range.empty() && !range.fits(); }
__device__ bool searched(Mxfp4 method, Range range) { return method == Mxfp4::best && beyond_window(range); }

// Which statistics does alpha need? `hybrid` takes neither.
bool wants_amax(Mxfp4 method) { return method == Mxfp4::requantize || method == Mxfp4::best; }
bool recodes_densely(Mxfp4 method) { return method == Mxfp4::requantize || method == Mxfp4::hybrid; }
__device__ bool needs_counts(Mxfp4 method, Range range) {
  return (method == Mxfp4::verbatim_midpoint || method == Mxfp4::verbatim_search) && beyond_window(range);
}

struct Part {  // of a matrix: blocks [begin, end)
  int64_t e, begin, end, blocks;
  __device__ Part(const Mxfp4Params& p, int64_t length) : blocks(p.N * p.K / 32) {
    const int64_t parts = max(int64_t{1}, (blocks + length - 1) / length);
    e = blockIdx.x / parts;
    begin = (blockIdx.x - e * parts) * length;
    end = min(begin + length, blocks);
  }
};
unsigned parts_of(const Mxfp4Params& p, int64_t length) {
  return static_cast<unsigned>(p.E * std::max<int64_t>(1, (p.N * p.K / 32 + length - 1) / length));
}

struct Halves {
  uint64_t of[2];
};
__device__ Halves codes_of(const Mxfp4Params& p, int64_t block) {
  const ulonglong2 both = reinterpret_cast<const ulonglong2*>(p.packed)[block];
  return {both.x, both.y};
}

// ---- statistics -----------------------------------------------------------------------------------

// The largest magnitude: of the codes that have all higher bits found so far, does any have the next?
__device__ int top_of(uint64_t codes) {
  int top = 0;
  uint64_t open = 0x4444444444444444u;
#pragma unroll
  for (int bit = 4; bit > 0; bit /= 2) {
    const uint64_t hit = codes & open;
    top |= hit ? bit : 0;
    open = (hit ? hit : open) >> 1;
  }
  return top;
}

__global__ void __launch_bounds__(kThreads) find_range(Mxfp4Params p, Work* work, bool wants_amax) {
  __shared__ int least, most;
  __shared__ uint32_t amax;  // bits; magnitudes order as they do
  const Part part(p, kLongChunk);
  Work& mine = work[part.e];
  uint32_t& all = reinterpret_cast<uint32_t&>(mine.stats.amax);
  if (threadIdx.x == 0)  // what other CTAs have found meanwhile: all the better
    least = mine.least, most = mine.most, amax = wants_amax ? all : bits_of(kFloatMax);
  __syncthreads();
  for (int64_t from = part.begin + threadIdx.x; from < part.end; from += kAhead * kThreads) {
    int bytes[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t b = from + i * kThreads;
      bytes[i] = b < part.end ? p.e8m0[part.e * part.blocks + b] : 255;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int low = *const_cast<volatile int*>(&least), high = *const_cast<volatile int*>(&most);
      const uint32_t top = *const_cast<volatile uint32_t*>(&amax),
                     could = static_cast<uint32_t>(bytes[i] + 2) << 23 | 0x400000;
      const bool known = 256 - bytes[i] <= low && bytes[i] + 1 <= high && could <= top;  // could be 6 * 2^k
      if (known || bytes[i] > kMaxByte) continue;
      const Halves codes = codes_of(p, part.e * part.blocks + from + i * kThreads);
      if (is_zero(codes.of[0] | codes.of[1])) continue;
      atomicMax(&least, 256 - bytes[i]);
      atomicMax(&most, bytes[i] + 1);
      if (could <= top) continue;
      const float here = e2m1_decode(max(top_of(codes.of[0]), top_of(codes.of[1]))) * e8m0_decode(bytes[i]);
      atomicMax(&amax, bits_of(here));
    }
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  if (least > mine.least) atomicMax(&mine.least, least);
  if (most > mine.most) atomicMax(&mine.most, most);
  if (wants_amax && amax > all) atomicMax(&all, amax);
}

__global__ void __launch_bounds__(kThreads) count_exponents(Mxfp4Params p, Work* work) {
  __shared__ uint32_t count[256], weight[256];
  const Part part(p, kLongChunk);
  if (!needs_counts(p.method, work[part.e].range())) return;
  count[threadIdx.x] = weight[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t b = part.begin + threadIdx.x; b < part.end; b += kThreads) {
    const int byte = p.e8m0[part.e * part.blocks + b];
    const Halves codes = codes_of(p, part.e * part.blocks + b);
    if (byte > kMaxByte || is_zero(codes.of[0] | codes.of[1])) continue;
    const uint64_t counts = count_magnitudes(codes.of[0]) + count_magnitudes(codes.of[1]);
    atomicAdd(count + byte, 1);
    atomicAdd(weight + byte, static_cast<uint32_t>(squares(counts)));
  }
  __syncthreads();
  if (count[threadIdx.x] == 0) return;
  Stats& stats = work[part.e].stats;
  const auto add = [](int64_t* to, uint32_t x) { atomicAdd(reinterpret_cast<unsigned long long*>(to), x); };
  add(stats.blocks + threadIdx.x, count[threadIdx.x]);
  add(stats.squares + threadIdx.x, weight[threadIdx.x]);
}

// mxfp4::search, an m a thread: there are at most 236.
__global__ void __launch_bounds__(kThreads) search_power(Mxfp4Params p, Work* work) {
  __shared__ double errors[kThreads];
  const Range range = work[blockIdx.x].range();
  if (!needs_counts(p.method, range)) return;
  const int first = range.kmin - kLow, count = range.kmax - kHigh - first + 1;
  const int t = threadIdx.x;
  if (t < count) errors[t] = clamped_error(work[blockIdx.x].stats, range, first + t);
  __syncthreads();
  if (t > 0) return;
  int best = 0;
  for (int i = 1; i < count; ++i)
    if (errors[i] < errors[best]) best = i;
  work[blockIdx.x].searched = first + best;
}

// ---- `best` beyond the window ---------------------------------------------------------------------

// Squared errors by step and magnitude, in units of the block's power of two 2^k: step = a (1 + m/8) 2^i with
// alpha = a 2^q, for i = kFirst .. kLast. Scaling by a power of two commutes with every rounding here. Above,
// every code becomes 0; below, all saturate, and twice the scale is strictly better and exists: `best` takes
// no alpha whose largest step is below i = -4 for the top block.
struct ErrorTable {
  static constexpr int kFirst = -5, kLast = 4, kTicks = 8 * (kLast - kFirst + 1);
  double of[kTicks][7];
};
__device__ int exponent_of(float alpha) {
  return static_cast<int>(bits_of(alpha) >> 23) - 127;
}  // a normal one

__device__ void fill(ErrorTable& table, float alpha) {
  const double a = static_cast<double>(alpha) * two_to(-exponent_of(alpha));
  for (int i = threadIdx.x; i < ErrorTable::kTicks * 7; i += blockDim.x) {
    const int tick = i / 7, v = i % 7 + 1;
    const double step = a * (8 + tick % 8) * two_to(tick / 8 + ErrorTable::kFirst - 3), x = e2m1_decode(v);
    const double d = x - e2m1_decode(nearest(x, step)) * step;
    table.of[tick][v - 1] = d * d;
  }
}

// An e4m3 byte as 8 j + m of its value (1 + m/8) 2^(j - 9); those below 8 are subnormal.
__device__ int tick_of(int e4m3) {
  return e4m3 >= 8 ? e4m3 + 16 : static_cast<int>(0x161412100c080000ull >> (8 * e4m3) & 255);
}

struct Choice {
  double error;
  int e4m3;
};
__device__ Choice best_scale(const ErrorTable& table, uint64_t counts, int byte, float alpha) {
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

__device__ double lane_sum(double x) {
  for (int half = 16; half; half /= 2) x += __shfl_xor_sync(kAll, x, half);
  return x;
}

// errors[e][i][row]: numbers.lane_sum over the row's half blocks. CTAs of a matrix and candidate take its
// rows in turn; a warp has a row.
__global__ void __launch_bounds__(kThreads)
    sum_row_errors(Mxfp4Params p, const Work* work, double* errors, unsigned ctas) {
  __shared__ ErrorTable table;
  const int which = blockIdx.x / ctas, e = which / kCandidates, lane = threadIdx.x % 32;
  const Range range = work[e].range();
  if (!searched(p.method, range)) return;
  const Scale scale = candidate(work[e].stats, range, which % kCandidates);
  fill(table, scale.alpha);
  __syncthreads();
  const uint64_t* codes = reinterpret_cast<const uint64_t*>(p.packed) + e * p.N * p.K / 16;
  const uint8_t* bytes = p.e8m0 + e * p.N * p.K / 32;
  constexpr int kRows = kThreads / 32;
  for (int64_t row = blockIdx.x % ctas * kRows + threadIdx.x / 32; row < p.N; row += ctas * kRows) {
    double sum = 0.0;
    for (int64_t s = row * p.K / 16 + lane; s < (row + 1) * p.K / 16; s += 32) {
      const uint64_t half = codes[s];
      const int byte = bytes[s / 2];
      if (is_zero(half) || kept_scale(p.method, scale, byte) != kQuantize) continue;
      sum += best_scale(table, count_magnitudes(half), byte, scale.alpha).error;
    }
    sum = lane_sum(sum);
    if (lane == 0) errors[which * p.N + row] = sum;
  }
}

// numbers.lane_sum over the rows, by one warp.
__global__ void sum_errors(Mxfp4Params p, Work* work, const double* errors) {
  const int e = blockIdx.x / kCandidates, i = blockIdx.x % kCandidates;
  if (!searched(p.method, work[e].range())) return;
  double total = 0.0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < p.N; row += 32) total += errors[blockIdx.x * p.N + row];
  total = lane_sum(total);
  if (threadIdx.x == 0) work[e].errors[i] = total;
}

// ---- output ---------------------------------------------------------------------------------------

__device__ Scale scale_of(const Work& work, Mxfp4 method) {
  const Range range = work.range();
  if (range.empty()) return {1.0f, true, 0};
  if (searched(method, range)) {
    int best = 0;
    for (int i = 1; i < kCandidates; ++i)
      if (work.errors[i] < work.errors[best]) best = i;
    return candidate(work.stats, range, best);
  }
  if (method == Mxfp4::verbatim_search && !range.fits()) return power(work.searched);
  return direct_scale(work.stats, range, method);
}

// A Recode as convert() uses it: new magnitude codes by old ones, a byte each, and the scale.
struct alignas(16) Lookup {
  uint32_t low, high, sf;

  __device__ explicit Lookup(const Recode& r) : low(0), high(0), sf(r.sf) {
#pragma unroll
    for (int v = 0; v < 4; ++v) low |= r.code[v] << 8 * v, high |= r.code[v + 4] << 8 * v;
  }
  // Recode::apply: a permute looks up four codes in the eight bytes at once, and packs its nibbles.
  __device__ uint64_t apply(uint64_t codes) const {
    uint64_t out = codes & 0x8888888888888888u;
#pragma unroll
    for (int i = 0; i < 64; i += 16) {
      uint32_t four = __byte_perm(low, high, static_cast<uint32_t>(codes >> i) & 0x7777);
      four = (four | four >> 4) & 0x00ff00ffu;
      out |= static_cast<uint64_t>((four | four >> 8) & 0xffff) << i;
    }
    return out;
  }
};

// recode_dense takes nine divisions, and there are few different half blocks to it: by e8m0 byte and largest
// magnitude, once a matrix.
constexpr int kRecodes = 256 * 8;
__global__ void __launch_bounds__(kThreads) tabulate(Mxfp4Params p, const Work* work, Lookup* table) {
  const int i = blockIdx.x * kThreads + threadIdx.x, e = i / kRecodes, byte = i % kRecodes / 8;
  const Range range = work[e].range();
  if (byte - kBias < range.kmin || byte - kBias > range.kmax) return;
  table[i] = Lookup(recode_dense(i % 8, byte, scale_of(work[e], p.method).alpha));
}

// How convert() finds new codes: by the error table under `best`, by tabulate()'s otherwise.
template <bool kBest>
struct Recoder {
  Scale scale;
  const ErrorTable& errors;
  const Lookup* table;  // of the matrix

  __device__ Lookup of(uint64_t codes, int byte) const {
    if constexpr (!kBest) return table[byte * 8 + top_of(codes)];
    const int e4m3 = best_scale(errors, count_magnitudes(codes), byte, scale.alpha).e4m3;
    return Lookup(recode_nearest(e4m3, byte, scale.alpha));
  }
};

// One half block: its scale, and its codes changed where they have to be.
template <bool kBest>
__device__ uint8_t convert_half(const Mxfp4Params& p, const Recoder<kBest>& recoder, bool bad, int byte,
                                uint64_t& codes) {
  if (bad) return kE4m3NaN;
  if (is_zero(codes)) return kOne;
  const uint8_t kept = kept_scale(p.method, recoder.scale, byte);
  if (kept != kQuantize) return kept;
  const Lookup r = recoder.of(codes, byte);
  codes = r.apply(codes);
  return static_cast<uint8_t>(r.sf);
}

template <bool kBest>
__global__ void __launch_bounds__(kThreads, kBest ? 4 : 5)
    convert(Mxfp4Params p, const Work* work, const Lookup* table) {
  __shared__ Scale shared_scale;
  __shared__ ErrorTable errors;
  const Part part(p, kChunk);
  const int64_t first = part.e * part.blocks;
  Halves codes[kEach];
  int byte[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {  // under way while the scale is found
    const int64_t b = part.begin + i * kThreads + threadIdx.x;
    if (b < part.end) codes[i] = codes_of(p, first + b), byte[i] = p.e8m0[first + b];
  }
  if (threadIdx.x == 0) shared_scale = scale_of(work[part.e], p.method);
  __syncthreads();
  const Scale scale = shared_scale;
  if (threadIdx.x == 0 && part.begin == 0) p.alpha[part.e] = scale.alpha;
  if (kBest && searched(p.method, work[part.e].range())) {
    fill(errors, scale.alpha);
    __syncthreads();
  }
  const Recoder<kBest> recoder{scale, errors, table + part.e * kRecodes};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t b = part.begin + i * kThreads + threadIdx.x;
    if (b >= part.end) break;
    const bool bad = byte[i] > kMaxByte && !is_zero(codes[i].of[0] | codes[i].of[1]);
    uchar2 sf;
    sf.x = convert_half(p, recoder, bad, byte[i], codes[i].of[0]);
    sf.y = convert_half(p, recoder, bad, byte[i], codes[i].of[1]);
    reinterpret_cast<uchar2*>(p.sf)[first + b] = sf;
    reinterpret_cast<ulonglong2*>(p.packed_out)[first + b] = {codes[i].of[0], codes[i].of[1]};
  }
}

}  // namespace

// Behind the Works: requantize's and hybrid's tables, or the row errors of `best`.
int64_t mxfp4_workspace(const Mxfp4Params& p) {
  int64_t each = sizeof(Work);
  if (recodes_densely(p.method)) each += kRecodes * sizeof(Lookup);
  if (p.method == Mxfp4::best) each += p.N * kCandidates * sizeof(double);
  return p.E * each;
}

void mxfp4_to_nvfp4(const Mxfp4Params& p, void* workspace, cudaStream_t stream) {
  if (p.E == 0) return;
  Work* work = static_cast<Work*>(workspace);
  void* rest = work + p.E;
  CUDA_CHECK(cudaMemsetAsync(work, 0, p.E * sizeof(Work), stream));
  const unsigned parts = parts_of(p, kLongChunk), matrices = static_cast<unsigned>(p.E);
  find_range<<<parts, kThreads, 0, stream>>>(p, work, wants_amax(p.method));
  if (p.method == Mxfp4::verbatim_midpoint || p.method == Mxfp4::verbatim_search)
    count_exponents<<<parts, kThreads, 0, stream>>>(p, work);
  if (p.method == Mxfp4::verbatim_search) search_power<<<matrices, kThreads, 0, stream>>>(p, work);
  if (p.method == Mxfp4::best) {
    double* errors = static_cast<double*>(rest);
    const unsigned sums = matrices * kCandidates, ctas = 1 + 8 * sm_count() / sums;
    sum_row_errors<<<sums * ctas, kThreads, 0, stream>>>(p, work, errors, ctas);
    sum_errors<<<sums, 32, 0, stream>>>(p, work, errors);
  }
  Lookup* table = static_cast<Lookup*>(rest);
  if (recodes_densely(p.method))
    tabulate<<<matrices*(kRecodes / kThreads), kThreads, 0, stream>>>(p, work, table);
  const auto kernel = p.method == Mxfp4::best ? convert<true> : convert<false>;
  kernel<<<parts_of(p, kChunk), kThreads, 0, stream>>>(p, work, table);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace nvfp4::cuda
