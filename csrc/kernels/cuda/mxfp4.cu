// mxfp4_to_nvfp4. The first pass reads exponents and, of the codes, only blocks that would widen the range
// known so far or raise the maximum; a tensor that loses nothing is then read and written once. The other
// passes are launched where the method may need them and leave at once for matrices that don't: nobody waits
// for the device to say. csrc/kernels/mxfp4.h has the arithmetic.
#include <algorithm>

#include "mxfp4.cuh"

namespace nvfp4::cuda {
namespace {

constexpr int kEach = 4;                  // blocks of 32 values a thread converts
constexpr int kChunk = kThreads * kEach;  // a CTA
constexpr int kAhead = 16;                // exponents a thread has under way: 64 dependent loads else
constexpr float kFloatMax = 0x1.fffffep+127f;
constexpr int kLongChunk = 16 * kChunk;  // or counts; the sums of squares fit 32 bits

// Which statistics does alpha need? `hybrid` takes neither.
bool wants_amax(Mxfp4 method) { return method == Mxfp4::requantize || method == Mxfp4::best; }
bool recodes_densely(Mxfp4 method) { return method == Mxfp4::requantize || method == Mxfp4::hybrid; }
__device__ bool needs_counts(Mxfp4 method, Range range) {
  return (method == Mxfp4::verbatim_midpoint || method == Mxfp4::verbatim_search) && beyond_window(range);
}

struct Part {  // of a matrix: blocks [begin, end)
  int e;
  int64_t begin, end, blocks;
  __device__ Part(const Mxfp4Params& p, int64_t length) : blocks(p.N * p.K / 32) {
    const int64_t parts = max(int64_t{1}, (blocks + length - 1) / length);
    e = static_cast<int>(blockIdx.x / parts);
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

// ---- the choice -----------------------------------------------------------------------------------

__device__ Scale scale_of(const Work& work, Mxfp4 method) {
  const Range range = work.range();
  if (range.empty()) return {1.0f, true, 0};
  if (!searched(method, range)) return direct_scale(work.stats, range, method);
  int best = 0;
  for (int i = 1; i < kCandidates; ++i)
    if (work.errors[i] < work.errors[best]) best = i;
  return candidate(work.stats, range, best);
}

// mxfp4::search, an m a thread: there are at most 236.
__device__ Scale search_power(const Work& work) {
  __shared__ double errors[kThreads];
  const Range range = work.range();
  const int first = range.kmin - kLow, count = range.kmax - kHigh - first + 1, t = threadIdx.x;
  if (t < count) errors[t] = clamped_error(work.stats, range, first + t);
  __syncthreads();
  int best = 0;
  for (int i = 1; i < count; ++i)
    if (errors[i] < errors[best]) best = i;
  return power(first + best);
}

__global__ void __launch_bounds__(kThreads) choose(Mxfp4Params p, Work* work) {
  Work& mine = work[blockIdx.x];
  const bool searches = p.method == Mxfp4::verbatim_search && beyond_window(mine.range());
  if (!searches && threadIdx.x > 0) return;
  const Scale scale = searches ? search_power(mine) : scale_of(mine, p.method);
  if (threadIdx.x > 0) return;
  mine.scale = scale;
  p.alpha[blockIdx.x] = scale.alpha;
}

// ---- output ---------------------------------------------------------------------------------------

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
  table[i] = Lookup(recode_dense(i % 8, byte, work[e].scale.alpha));
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
  __shared__ ErrorTable errors;
  const Part part(p, kChunk);
  const int64_t first = part.e * part.blocks + part.begin + threadIdx.x;  // of the thread's blocks, of all
  const int count = static_cast<int>(part.end - part.begin) - static_cast<int>(threadIdx.x);
  Halves codes[kEach];
  int byte[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (i * kThreads < count)
      codes[i] = codes_of(p, first + i * kThreads), byte[i] = p.e8m0[first + i * kThreads];
  const Scale scale = work[part.e].scale;
  if (kBest && searched(p.method, work[part.e].range())) {
    fill(errors, scale.alpha);
    __syncthreads();
  }
  const Recoder<kBest> recoder{scale, errors, table + part.e * kRecodes};
#pragma unroll
  for (int i = 0; i < kEach && i * kThreads < count; ++i) {
    const bool bad = byte[i] > kMaxByte && !is_zero(codes[i].of[0] | codes[i].of[1]);
    uchar2 sf;
    sf.x = convert_half(p, recoder, bad, byte[i], codes[i].of[0]);
    sf.y = convert_half(p, recoder, bad, byte[i], codes[i].of[1]);
    reinterpret_cast<uchar2*>(p.sf)[first + i * kThreads] = sf;
    reinterpret_cast<ulonglong2*>(p.packed_out)[first + i * kThreads] = {codes[i].of[0], codes[i].of[1]};
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
  if (p.method == Mxfp4::best) sum_candidates(p, work, static_cast<double*>(rest), stream);
  choose<<<matrices, kThreads, 0, stream>>>(p, work);
  Lookup* table = static_cast<Lookup*>(rest);
  if (recodes_densely(p.method))
    tabulate<<<matrices*(kRecodes / kThreads), kThreads, 0, stream>>>(p, work, table);
  const auto kernel = p.method == Mxfp4::best ? convert<true> : convert<false>;
  kernel<<<parts_of(p, kChunk), kThreads, 0, stream>>>(p, work, table);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace nvfp4::cuda
