// grouped_gemm on every chip from sm_80 on: mma.sync on bf16 that each warp decodes in registers.
//
// A CTA of four warps computes 16 MT rows x 32 NT columns, a warp all rows of its 8 NT columns. Stages of 64
// values of K arrive by cp.async. The four lanes that share a row of an MMA fragment own 16 consecutive
// values of a stage each: one NVFP4 block, 8 bytes and one scale, for weights and packed activations alike.
// Which k an MMA calls k does not matter as long as both operands agree. An output is summed in ascending
// stages by the same instructions whatever the tile, R or the other rows are.
//
// cp.async wants addresses aligned as allocators align them: 16 bytes for bf16 rows, 8 for codes, 4 for b_sf.
#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace nvfp4::cuda {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kThreads = 128;
constexpr int kStep = 64;                // values of K a stage holds
constexpr int kBlocks = kStep / kBlock;  // and its scales, a 32-bit word of either layout
constexpr int kCodeBytes = kStep / 2;

// ---- which rows a CTA computes --------------------------------------------------------------------

struct Tile {
  int e;           // p.E: rows of no expert
  int begin, end;  // rows
  int live;        // rows before it are no expert's either
};

__device__ int2 rows_of(const GemmParams& p, int64_t e) {
  if (!p.offsets) return {0, static_cast<int>(p.R)};
  const int R = static_cast<int>(p.R), begin = min(max(p.offsets[e], 0), R);
  return {begin, max(min(p.offsets[e + 1], R), begin)};
}

// Experts own consecutive segments of the rows, each up to its end offset; what remains is no expert's. Where
// offsets lie, a segment starts where the furthest one before it ends: every row is in exactly one, so that
// the grid suffices. A warp finds its tile alone: lanes take consecutive experts, a scan brings them
// together.
template <int kRows>
__device__ bool find_tile(const GemmParams& p, Tile& tile) {
  const int lane = threadIdx.x % 32, R = static_cast<int>(p.R), E = p.a_rows > 0 ? static_cast<int>(p.E) : 0;
  const int each = (E + 31) / 32, first = min(lane * each, E), last = min(first + each, E);
  int furthest = 0;
  for (int e = first; e < last; ++e) {
    const int2 rows = rows_of(p, e);
    if (rows.y > rows.x) furthest = max(furthest, rows.y);
  }
  int cut = __shfl_up_sync(kAll, furthest, 1);
  if (lane == 0) cut = 0;
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(kAll, cut, step);
    if (lane >= step) cut = max(cut, lower);
  }

  int tiles = 0, from = cut;
  for (int e = first; e <= last; ++e) {  // lane 31 ends with the rows of no expert
    const int2 rows = e < last ? rows_of(p, e) : lane == 31 ? int2{0, R} : int2{0, 0};
    if (rows.y <= rows.x || rows.y <= from) continue;
    tiles += (rows.y - from + kRows - 1) / kRows;
    from = rows.y;
  }
  int through = tiles;
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(kAll, through, step);
    if (lane >= step) through += lower;
  }

  int left = static_cast<int>(blockIdx.x) - (through - tiles);
  const uint32_t owners = __ballot_sync(kAll, left >= 0 && left < tiles);
  if (owners == 0) return false;
  const int owner = __ffs(owners) - 1;
  from = cut;
  for (int e = first; e <= last && lane == owner; ++e) {
    const int2 rows = e < last ? rows_of(p, e) : int2{R, R};
    const int to = e < last ? rows.y : R;
    if ((e < last && rows.y <= rows.x) || to <= from) continue;
    const int here = (to - from + kRows - 1) / kRows;
    if (left < here) {
      const int begin = from + left * kRows;
      tile = {e < last ? e : static_cast<int>(p.E), begin, min(begin + kRows, to), rows.x};
      break;
    }
    left -= here;
    from = to;
  }
  tile = {__shfl_sync(kAll, tile.e, owner), __shfl_sync(kAll, tile.begin, owner),
          __shfl_sync(kAll, tile.end, owner), __shfl_sync(kAll, tile.live, owner)};
  return true;
}

__device__ int source_row(const GemmParams& p, int r) {
  return min(max(p.rows ? p.rows[r] : r, 0), static_cast<int>(p.a_rows) - 1);
}

// ---- stages in shared memory ----------------------------------------------------------------------

template <int kRows, int kCols, bool kPackedA>
struct Stage {
  alignas(16) uint8_t b[kCols][kCodeBytes];
  alignas(16) uint8_t a[kRows][kPackedA ? kCodeBytes : 2 * kStep];
  uint32_t b_sf[kCols], a_sf[kPackedA ? kRows : 1];
};

// Past the end of K nothing is read and the bytes become 0.
template <int kBytes>
__device__ void copy_async(void* to, const void* from, bool inside) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(kBytes),
               "r"(inside ? kBytes : 0));
}

// What a thread copies of every stage: 8-byte blocks of codes, or 16 bytes of bf16, of every 32nd (16th) row.
// Rows past the tile's end repeat its last one; they are computed and not stored.
template <int kRows, int kCols, bool kPackedA>
class Loader {
 public:
  __device__ Loader(const GemmParams& p, const Tile& tile, int n0) : blocks_(static_cast<int>(p.K / kBlock)) {
    const SfLayout layout{p.N, blocks_};
    const int t = threadIdx.x, last = static_cast<int>(p.N) - 1;
#pragma unroll
    for (int i = 0; i < kCols / 32; ++i)
      b_[i] = p.b + (tile.e * p.N + min(n0 + t / kBlocks + 32 * i, last)) * (p.K / 2) + t % kBlocks * 8;
    b_sf_ = p.b_sf + tile.e * layout.cosize() + (t < kCols ? layout.offset(n0 + t, 0) : 0);
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int64_t row = source_row(p, min(tile.begin + (t + i * kThreads) / kUnits, tile.end - 1));
      a_[i] = kPackedA ? p.a_packed + row * (p.K / 2) + t % kUnits * 8
                       : reinterpret_cast<const uint8_t*>(p.a + row * p.K) + t % kUnits * 16;
    }
    if constexpr (kPackedA) {
      a_sf_ = p.a_sf + source_row(p, min(tile.begin + t, tile.end - 1)) * p.K / kBlock;
      a_sf_words_ = blocks_ % kBlocks == 0 && reinterpret_cast<uintptr_t>(p.a_sf) % kBlocks == 0;
    }
  }

  // The stage that starts with block `first` of K.
  __device__ void load(int first, Stage<kRows, kCols, kPackedA>& stage) const {
    const int t = threadIdx.x, unit = t % kUnits;
    const bool inside = first + t % kBlocks < blocks_;
#pragma unroll
    for (int i = 0; i < kCols / 32; ++i)
      copy_async<8>(&stage.b[t / kBlocks + 32 * i][t % kBlocks * 8], b_[i] + first * 8, inside);
    if (t < kCols)
      copy_async<4>(&stage.b_sf[t], b_sf_ + first * (SfLayout::kAtom / kBlocks), first < blocks_);
    const bool a_inside = first + (kPackedA ? unit : unit / 2) < blocks_;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int row = (t + i * kThreads) / kUnits;
      if (kRows * kUnits % kThreads != 0 && row >= kRows) break;
      if constexpr (kPackedA)
        copy_async<8>(&stage.a[row][unit * 8], a_[i] + first * 8, a_inside);
      else  // units rotate by row, so that a fragment's 16-byte reads spread over the banks
        copy_async<16>(&stage.a[row][(unit ^ row % 8) * 16], a_[i] + first * 2 * kBlock, a_inside);
    }
    if constexpr (kPackedA) {
      if (t < kRows) load_a_sf(first, stage.a_sf[t]);
    }
    asm volatile("cp.async.commit_group;");
  }
  __device__ int blocks() const { return blocks_; }

 private:
  static constexpr int kUnits = kPackedA ? kBlocks : kStep / 8;  // of a row of a
  static constexpr int kRowsEach = (kRows * kUnits + kThreads - 1) / kThreads;

  __device__ void load_a_sf(int first, uint32_t& to) const {
    if (a_sf_words_) return copy_async<4>(&to, a_sf_ + first, first < blocks_);
    uint32_t word = 0;  // rows of scales that start anywhere
    for (int i = 0; i < kBlocks && first + i < blocks_; ++i)
      word |= static_cast<uint32_t>(a_sf_[first + i]) << 8 * i;
    to = word;
  }

  int blocks_;  // of K
  const uint8_t *b_[kCols / 32], *b_sf_, *a_[kRowsEach], *a_sf_;
  bool a_sf_words_;  // each row's scales start at a word
};

// ---- decoding and multiplying ---------------------------------------------------------------------

__device__ uint32_t multiply(uint32_t a, uint32_t b) {  // bf16 pairs; mul itself needs sm_90
  uint32_t c;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(b), "r"(0x80008000u));  // + -0 keeps the sign
  return c;
}

// 16 values of one row: word 4 h + i holds values 8 h + i and 8 h + i + 4, the nibbles that shift together.
struct Values {
  uint32_t pair[8];
};

// e2m1 bits read as bf16 are 2^-126 of their value (0.5 is a subnormal), e4m3 bits 2^-120. One multiplication
// by the scale times 2^119, the most that is finite, leaves 2^-7 of the product, exactly; the epilogue takes
// it back.
constexpr float kUndecoded = 128.0f;
__device__ uint32_t decode_scale(int8_t byte) {
  const uint32_t bits = static_cast<uint32_t>(byte * 16) & 0x87f0, twice = 0x00010001u;
  const uint32_t scale = multiply(multiply(bits * twice, 0x7f00u * twice), 0x7780u * twice);  // 2^127, 2^112
  return (bits & 0x7f0) == 0x7f0 ? 0x7fc0u * twice : scale;
}
__device__ void decode_word(uint32_t codes, uint32_t scale, uint32_t* pair) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitude = i < 2 ? codes << (6 - 4 * i) : codes >> (4 * i - 6);
    pair[i] = multiply((codes << (12 - 4 * i) & 0x80008000u) | (magnitude & 0x01c001c0u), scale);
  }
}

// The block of lane % 4 in a row of codes. Past the end of K codes are 0, and scales may be anything.
__device__ Values decode(const uint8_t* row, const uint32_t& scales, bool inside) {
  const int c = threadIdx.x % 4;
  const uint2 codes = *reinterpret_cast<const uint2*>(row + 8 * c);
  const int8_t byte = reinterpret_cast<const int8_t*>(&scales)[c];
  const uint32_t scale = decode_scale(inside ? byte : 0);
  Values v;
  decode_word(codes.x, scale, v.pair);
  decode_word(codes.y, scale, v.pair + 4);
  return v;
}

__device__ Values read_bf16(const uint8_t* stage_row, int row) {
  Values v;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int unit = (threadIdx.x % 4 * 2 + h) ^ row % 8;
    const uint4 x = *reinterpret_cast<const uint4*>(stage_row + unit * 16);
    v.pair[4 * h] = __byte_perm(x.x, x.z, 0x5410);
    v.pair[4 * h + 1] = __byte_perm(x.x, x.z, 0x7632);
    v.pair[4 * h + 2] = __byte_perm(x.y, x.w, 0x5410);
    v.pair[4 * h + 3] = __byte_perm(x.y, x.w, 0x7632);
  }
  return v;
}

__device__ void multiply_add(float (&acc)[4], const Values (&a)[2], const Values& b, int j) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0].pair[j]), "r"(a[1].pair[j]), "r"(a[0].pair[j + 1]), "r"(a[1].pair[j + 1]), "r"(b.pair[j]),
        "r"(b.pair[j + 1]));
}

template <int MT, int NT, bool kPackedA>
__device__ void multiply_stage(const Stage<16 * MT, 32 * NT, kPackedA>& stage, bool inside,
                               float (&acc)[MT][NT][4]) {
  const int g = threadIdx.x % 32 / 4, n0 = threadIdx.x / 32 * 8 * NT;
  Values b[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n) b[n] = decode(stage.b[n0 + 8 * n + g], stage.b_sf[n0 + 8 * n + g], inside);
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    Values a[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * m + 8 * h + g;
      if constexpr (kPackedA)
        a[h] = decode(stage.a[row], stage.a_sf[row], inside);
      else
        a[h] = read_bf16(stage.a[row], row);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2)
#pragma unroll
      for (int n = 0; n < NT; ++n) multiply_add(acc[m][n], a, b[n], j);
  }
}

// ---- epilogue -------------------------------------------------------------------------------------

struct Column {
  float alpha, bias;
};
__device__ Column column_of(const GemmParams& p, int e, int n) {
  if (n >= p.N) return {};
  const int64_t half = p.alphas == 1 ? 0 : n * p.alphas / p.N;
  return {p.alpha[e * p.alphas + half], p.bias ? p.bias[e * p.N + n] : 0.0f};
}
__device__ uint32_t finish(const GemmParams& p, float acc, Column column, float a_scale) {
  const float product = acc * (p.a ? kUndecoded : kUndecoded * kUndecoded) * column.alpha * a_scale;
  return to_bf16(p.bias ? product + column.bias : product).bits;  // adding 0 would turn -0 into 0
}

__device__ void store_pair(const GemmParams& p, int r, int n, uint32_t first, uint32_t second) {
  bf16* out = p.out + r * p.N + n;
  if (p.N % 2 == 0 && n < p.N) {
    *reinterpret_cast<uint32_t*>(out) = second << 16 | first;
  } else {
    if (n < p.N) out[0].bits = static_cast<uint16_t>(first);
    if (n + 1 < p.N) out[1].bits = static_cast<uint16_t>(second);
  }
}

template <int MT, int NT>
__device__ void store_tile(const GemmParams& p, const Tile& tile, int n0, const float (&acc)[MT][NT][4]) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const bool owned = tile.e < p.E;
  Column column[NT][2] = {};
#pragma unroll
  for (int n = 0; n < 2 * NT && owned; ++n)
    column[n / 2][n % 2] = column_of(p, tile.e, n0 + n / 2 * 8 + 2 * c + n % 2);
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
    const int r = tile.begin + 8 * i + g;
    if (r >= tile.end) break;
    const bool live = owned && r >= tile.live;
    const float a_scale = !live || !p.a_scale ? 1.0f : p.a_scale[p.a_scale_per_row ? source_row(p, r) : 0];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float* sums = &acc[i / 2][n][i % 2 * 2];
      const uint32_t first = finish(p, sums[0], column[n][0], a_scale);
      const uint32_t second = finish(p, sums[1], column[n][1], a_scale);
      store_pair(p, r, n0 + 8 * n + 2 * c, live ? first : 0, live ? second : 0);
    }
  }
}

// ---- kernel ---------------------------------------------------------------------------------------

// Few rows wait for memory: 9 CTAs on an SM want at most 56 registers a thread.
template <int MT, int NT, int kStages, bool kPackedA>
__global__ void __launch_bounds__(kThreads, MT == 1 ? 9 : 1) gemm_tile(GemmParams p) {
  constexpr int kRows = 16 * MT, kCols = 32 * NT;
  __shared__ Stage<kRows, kCols, kPackedA> stages[kStages];
  Tile tile;
  if (!find_tile<kRows>(p, tile)) return;
  const int n0 = blockIdx.y * kCols;
  float acc[MT][NT][4] = {};

  if (tile.e < p.E) {
    Loader<kRows, kCols, kPackedA> loader(p, tile, n0);
    for (int s = 0; s < kStages - 1; ++s) loader.load(s * kBlocks, stages[s]);
    int read = 0, write = kStages - 1;
    const int c = threadIdx.x % 4;
    for (int block = 0; block < loader.blocks(); block += kBlocks) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2));
      __syncthreads();  // stage `read` is there, and everyone is done with `write`
      loader.load(block + (kStages - 1) * kBlocks, stages[write]);
      multiply_stage<MT, NT, kPackedA>(stages[read], block + c < loader.blocks(), acc);
      read = read + 1 < kStages ? read + 1 : 0;
      write = write + 1 < kStages ? write + 1 : 0;
    }
  }
  store_tile<MT, NT>(p, tile, n0 + threadIdx.x / 32 * 8 * NT, acc);
}

template <int MT, int NT, int kStages>
void launch(const GemmParams& p, cudaStream_t stream) {
  constexpr int kRows = 16 * MT, kCols = 32 * NT;
  const int64_t tiles = p.R / kRows + std::min(p.E + 1, p.R);  // each segment's last tile may be short
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>((p.N + kCols - 1) / kCols));
  if (p.a)
    gemm_tile<MT, NT, kStages, false><<<grid, kThreads, 0, stream>>>(p);
  else
    gemm_tile<MT, NT, kStages, true><<<grid, kThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

struct Shape {
  int64_t most;  // rows an expert that it is meant for
  int rows, cols;
  void (*run)(const GemmParams&, cudaStream_t);
};
// Larger tiles decode a weight for more rows; smaller ones are more CTAs. Measured on an H200 (Qwen3-30B,
// DeepSeek-V3, one 8192 x 8192 matrix).
constexpr Shape kShapes[] = {{8, 16, 64, launch<1, 2, 4>},
                             {32, 32, 128, launch<2, 4, 3>},
                             {128, 64, 128, launch<4, 4, 3>},
                             {INT64_MAX, 128, 128, launch<8, 4, 2>}};

const Shape& shape_for(int64_t R, int64_t E) {
  const Shape* shape = kShapes;
  while (R > shape->most * E && shape->most != INT64_MAX) ++shape;
  return *shape;
}

}  // namespace

void grouped_gemm(const GemmParams& p, cudaStream_t stream) {
  if (p.R > 0 && p.N > 0) shape_for(p.R, p.E).run(p, stream);
}

std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool packed_a) {
  const Shape& shape = shape_for(R, E);
  return "cuda mma.sync, tile " + std::to_string(shape.rows) + "x" + std::to_string(shape.cols) +
         " of R = " + std::to_string(R) + ", N = " + std::to_string(N) + ", K = " + std::to_string(K) +
         (packed_a ? ", weights and activations" : ", weights") + " decoded in registers";
}

}  // namespace nvfp4::cuda
