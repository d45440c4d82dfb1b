// Where quantized rows and their scales go.
#pragma once
#include "device.h"
#include "kernels.h"

namespace nvfp4::cuda {

// A row's threads share its blocks: thread t has blocks t, t + blockDim.x, .. What follows points at its
// first one; the k-th is k steps on.
__device__ inline int column(int k) { return static_cast<int>(threadIdx.x + k * blockDim.x); }

// A thread's first block, counted over rows of S.
__device__ inline int64_t block_index(uint32_t r, uint32_t S) {
  return static_cast<int64_t>(static_cast<uint64_t>(r) * S + threadIdx.x);
}

struct SfPlace {  // where a thread's scales go
  uint8_t* first;
  int step;  // 0: nowhere, no expert has the row

  __device__ void store(int k, uint8_t byte) const {
    if (step) first[static_cast<int64_t>(k) * step] = byte;
  }
};

struct QuantizedRows {                   // R rows of S blocks
  static constexpr bool kFirst = false;  // whether the next kernel comes up only when all before is done
  int64_t R;
  int S;
  uint8_t* packed;
  uint8_t* sf;
  float* scale;
  SfGroups groups;

  struct Row {
    uint2* codes;
    SfPlace scales;
    template <class Quantize>
    __device__ void put(int k, Quantize quantize) const {
      scales.store(k, quantize(codes[static_cast<int64_t>(k) * blockDim.x]));
    }
  };
  __device__ inline Row row(uint32_t r) const;

  void clear(cudaStream_t stream) const {  // the padding; the rows' own scales follow
    if (groups.offsets) CUDA_CHECK(cudaMemsetAsync(sf, 0, SfGroups::cosize(R, groups.E, S), stream));
  }
};

// Every warp of a row finds it by itself: the atoms of the experts that end before the row, and which row of
// its own expert it is.
__device__ inline SfPlace sf_place(const QuantizedRows& out, uint32_t r, int64_t block) {
  if (!out.groups.offsets) return {out.sf + block, column(1) - column(0)};
  int atoms = 0, local = -1;
  const auto bounded = [&](int32_t x, int64_t least) {
    return static_cast<int>(x < least ? least : x < out.R ? x : out.R);
  };
  for (int e = threadIdx.x % 32; e < out.groups.E; e += 32) {
    const int begin = bounded(out.groups.offsets[e], 0), end = bounded(out.groups.offsets[e + 1], begin);
    if (end <= r) atoms += (end - begin + 127) / 128;
    if (begin <= r && r < end) local = static_cast<int>(r) - begin;
  }
  atoms = __reduce_add_sync(~0u, atoms);
  local = __reduce_max_sync(~0u, local);
  const SfLayout layout{1, out.S};
  const int64_t atom = atoms + local / 128;
  if (local < 0 || atom >= SfGroups::atom_rows(out.R, out.groups.E)) return {nullptr, 0};
  return {out.sf + atom * layout.cosize() + layout.offset(local % 128, column(0)),
          (column(1) - column(0)) / SfLayout::kAtomCols * SfLayout::kAtom};
}

__device__ inline QuantizedRows::Row QuantizedRows::row(uint32_t r) const {
  const int64_t block = block_index(r, S);
  return {reinterpret_cast<uint2*>(packed) + block, sf_place(*this, r, block)};
}

}  // namespace nvfp4::cuda
