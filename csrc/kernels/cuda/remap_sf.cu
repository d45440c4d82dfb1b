// Scale factors, linear <-> interleaved. 4 bytes of each of the rows r, r + 32, r + 64, r + 96 are 16 bytes
// of an atom; a thread moves kSteps such pieces. A warp takes 16 atoms by 2 rows: runs of 64 bytes on the
// linear side, whole sectors of 32 on the other.
#include "vector.cuh"

namespace nvfp4::cuda {
namespace {

constexpr int kAtoms = 16, kThreads = 128;  // a CTA takes one row of atoms and kAtoms columns of them
constexpr int kCtas = 12;                   // an SM: bounds the registers, below what would spill
constexpr int kStepRows = kThreads / kAtoms, kSteps = 32 / kStepRows;
constexpr int kLastRow = 96 + (kSteps - 1) * kStepRows;  // of a thread's rows

struct Place {
  int64_t e, r, c;  // the first row and column of the thread's first piece
  __device__ explicit Place(const SfLayout& l) {
    const int64_t chunks = (l.atom_cols() + kAtoms - 1) / kAtoms;
    const int64_t atoms = divide(blockIdx.x, chunks);  // e * atom_rows + row of atoms
    e = divide(atoms, l.atom_rows());
    r = (atoms - e * l.atom_rows()) * SfLayout::kAtomRows + threadIdx.x / kAtoms;
    c = ((blockIdx.x - atoms * chunks) * kAtoms + threadIdx.x % kAtoms) * SfLayout::kAtomCols;
  }
};

// 4 bytes from p, of which `valid` exist; 0 for the others.
__device__ inline uint32_t load4(const uint8_t* p, int64_t valid) {
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < valid) word |= static_cast<uint32_t>(p[j]) << 8 * j;
  return word;
}

__device__ inline void store4(uint8_t* p, int64_t valid, uint32_t word) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < valid) p[j] = static_cast<uint8_t>(word >> 8 * j);
}

// `words`: the linear side can be addressed in words of 4 bytes.
__global__ void __launch_bounds__(kThreads, kCtas) remap_kernel(bool early, RemapParams p, bool words) {
  start(early);
  const SfLayout& l = p.layout;
  const Place at(l);
  if (at.c >= l.cols) return;
  const uint8_t* src = p.src + at.e * l.size() + at.r * l.cols + at.c;
  const bool inside = words && at.r + kLastRow < l.rows;
  uint32_t piece[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      const int64_t r = kStepRows * i + 32 * group;
      piece[i][group] = inside ? *reinterpret_cast<const uint32_t*>(src + r * l.cols)
                               : load4(src + r * l.cols, at.r + r < l.rows ? l.cols - at.c : 0);
    }
  }
  uint8_t* dst = p.dst + at.e * l.cosize() + l.offset(at.r, at.c);
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    *reinterpret_cast<uint4*>(dst + kStepRows * i * 16) = {piece[i][0], piece[i][1], piece[i][2],
                                                           piece[i][3]};
}

__global__ void __launch_bounds__(kThreads, kCtas) unmap_kernel(bool early, RemapParams p, bool words) {
  start(early);
  const SfLayout& l = p.layout;
  const Place at(l);
  if (at.c >= l.cols) return;
  const uint8_t* src = p.src + at.e * l.cosize() + l.offset(at.r, at.c);
  uint8_t* dst = p.dst + at.e * l.size() + at.r * l.cols + at.c;
  const bool aligned = reinterpret_cast<uintptr_t>(src) % 4 == 0;
  uint32_t piece[kSteps][4];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      const uint8_t* word = src + kStepRows * i * 16 + 4 * group;
      piece[i][group] = aligned ? *reinterpret_cast<const uint32_t*>(word) : load4(word, 4);
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      const int64_t r = kStepRows * i + 32 * group;
      if (at.r + r >= l.rows) continue;
      if (words)
        *reinterpret_cast<uint32_t*>(dst + r * l.cols) = piece[i][group];
      else
        store4(dst + r * l.cols, l.cols - at.c, piece[i][group]);
    }
  }
}

int64_t ctas_for(const RemapParams& p) {
  return p.E * p.layout.atom_rows() * ceil_div(p.layout.atom_cols(), kAtoms);
}

bool in_words(const uint8_t* linear, const SfLayout& l) {
  return l.cols % 4 == 0 && reinterpret_cast<uintptr_t>(linear) % 4 == 0;
}

}  // namespace

void remap_sf(const RemapParams& p, cudaStream_t stream) {
  launch(remap_kernel, {ctas_for(p), kThreads}, stream, p, in_words(p.src, p.layout));
}

void unmap_sf(const RemapParams& p, cudaStream_t stream) {
  launch(unmap_kernel, {ctas_for(p), kThreads}, stream, p, in_words(p.dst, p.layout));
}

}  // namespace nvfp4::cuda
