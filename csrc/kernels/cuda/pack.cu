// Weights between the public layout and Hopper's own order (sm90/packed.h). A CTA takes two blocks of 64 rows
// x 128 codes, one below the other: the rows of two whole atoms of scales. A thread moves what a thread of
// the MMA will own: 16 bytes of packed codes, which are twice 8 in the row. Four lanes share a row, so a
// warp's reads are whole sectors and its writes 512 bytes in a row.
#include "../sm90/packed.h"
#include "vector.cuh"

namespace nvfp4::cuda {
namespace {

using namespace sm90;

constexpr int kThreads = kPackedCodeBytes / 16;  // a thread for 16 bytes
constexpr int kBlocks = SfLayout::kAtomRows / kPackedRows;
constexpr int kAtomWords = kPackedSteps * SfLayout::kAtom / 8;  // uint2's of the two atoms

struct Place {
  int64_t e, pair, column;  // expert, atom row, column of blocks
  int row, c;               // in a block; of a step

  __device__ Place(int64_t N, int64_t K) {
    const int64_t columns = packed_columns(K), pairs = (N + SfLayout::kAtomRows - 1) / SfLayout::kAtomRows;
    const int64_t atoms = divide(blockIdx.x, columns);
    column = blockIdx.x - atoms * columns;
    e = divide(atoms, pairs);
    pair = atoms - e * pairs;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, unit = threadIdx.x / 128;
    row = 16 * warp + 8 * unit + row_of(lane / 4);
    c = lane % 4;
  }
  __device__ int64_t n(int i) const { return pair * SfLayout::kAtomRows + i * kPackedRows + row; }
  __device__ int64_t s(int step) const { return (column * kPackedSteps + step) * 4 + c; }
};

// Of the expert's packed bytes: the block in which row n is, or was to be.
__device__ inline int64_t block_at(const Place& at, int i, int64_t N, int64_t K) {
  const int64_t rows = at.e * (N / kPackedRows) + at.pair * kBlocks + i;
  return (rows * packed_columns(K) + at.column) * kPackedBytes;
}

// Byte of a scale in the shared atoms, and word j of them in the expert's scales; false where there is none.
__device__ inline int in_atoms(const Place& at, int i, int step) {
  const SfLayout atom{SfLayout::kAtomRows, 4};
  return step * SfLayout::kAtom + static_cast<int>(atom.offset(i * kPackedRows + at.row, at.c));
}
__device__ inline bool word_of_atoms(const Place& at, const SfLayout& sf, int j, int64_t& byte) {
  const int64_t column = at.column * kPackedSteps + j / (SfLayout::kAtom / 8);
  byte = at.e * sf.cosize() + (at.pair * sf.atom_cols() + column) * SfLayout::kAtom + j * 8 % SfLayout::kAtom;
  return j < kAtomWords && column < sf.atom_cols();
}

__global__ void __launch_bounds__(kThreads) pack_kernel(bool early, PackParams p) {
  __shared__ uint2 atoms[kAtomWords];
  start(early);
  const Place at(p.N, p.K);
  const SfLayout sf{p.N, p.K / kBlock};
  uint2 codes[kBlocks][kPackedSteps] = {};
#pragma unroll
  for (int i = 0; i < kBlocks; ++i)
#pragma unroll
    for (int step = 0; step < kPackedSteps; ++step)
      if (at.n(i) < p.N && at.s(step) < sf.cols)
        codes[i][step] =
            *reinterpret_cast<const uint2*>(p.b + ((at.e * p.N + at.n(i)) * sf.cols + at.s(step)) * 8);
  if (int64_t byte; word_of_atoms(at, sf, threadIdx.x, byte))
    atoms[threadIdx.x] = *reinterpret_cast<const uint2*>(p.b_sf + byte);
  __syncthreads();
  const auto* scales = reinterpret_cast<const uint8_t*>(atoms);
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    if (at.n(i) >= p.N) break;
    uint32_t pair = 0;
    Words words[kPackedSteps];
#pragma unroll
    for (int step = 0; step < kPackedSteps; ++step) {
      words[step] = pack_block({codes[i][step].x, codes[i][step].y});
      if (at.s(step) < sf.cols) pair |= static_cast<uint32_t>(scales[in_atoms(at, i, step)]) << 8 * step;
    }
    uint8_t* block = p.packed + block_at(at, i, p.N, p.K);
    reinterpret_cast<uint4*>(block)[threadIdx.x] = {words[0].first, words[0].second, words[1].first,
                                                    words[1].second};
    reinterpret_cast<uint16_t*>(block + kPackedCodeBytes)[threadIdx.x] = static_cast<uint16_t>(pair);
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(bool early, UnpackParams p) {
  __shared__ uint2 atoms[kAtomWords];
  start(early);
  const Place at(p.N, p.K);
  const SfLayout sf{p.N, p.K / kBlock};
  auto* scales = reinterpret_cast<uint8_t*>(atoms);
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const bool there = at.n(i) < p.N;
    const uint8_t* block = p.packed + block_at(at, i, p.N, p.K);
    const uint4 packed = there ? reinterpret_cast<const uint4*>(block)[threadIdx.x] : uint4{};
    const uint32_t pair =
        there ? reinterpret_cast<const uint16_t*>(block + kPackedCodeBytes)[threadIdx.x] : 0;
    const Words words[kPackedSteps] = {unpack_block({packed.x, packed.y}),
                                       unpack_block({packed.z, packed.w})};
#pragma unroll
    for (int step = 0; step < kPackedSteps; ++step) {
      const bool inside = at.s(step) < sf.cols;
      scales[in_atoms(at, i, step)] = inside ? static_cast<uint8_t>(pair >> 8 * step) : 0;
      if (there && inside)
        *reinterpret_cast<uint2*>(p.b + ((at.e * p.N + at.n(i)) * sf.cols + at.s(step)) * 8) = {
            words[step].first, words[step].second};
    }
  }
  __syncthreads();
  if (int64_t byte; word_of_atoms(at, sf, threadIdx.x, byte))
    *reinterpret_cast<uint2*>(p.b_sf + byte) = atoms[threadIdx.x];
}

int64_t ctas(int64_t E, int64_t N, int64_t K) {
  return E * ceil_div(N, SfLayout::kAtomRows) * packed_columns(K);
}

}  // namespace

void pack_sm90(const PackParams& p, cudaStream_t stream) {
  launch(pack_kernel, {ctas(p.E, p.N, p.K), kThreads}, stream, p);
}

void unpack_sm90(const UnpackParams& p, cudaStream_t stream) {
  launch(unpack_kernel, {ctas(p.E, p.N, p.K), kThreads}, stream, p);
}

}  // namespace nvfp4::cuda
