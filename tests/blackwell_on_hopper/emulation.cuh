// The tcgen05 instructions of a CUTLASS NVFP4 kernel, as functions that Hopper runs. lower.py puts calls of
// them in the place of the instructions; everything else of the kernel stays what it is. Included before any
// CUTLASS header. Semantics: PTX ISA 9, "TensorCore 5th Generation Instructions".
//
// Tensor memory is an array in global memory, 128 lanes x 512 columns of 32 bits for every CTA. It starts as
// NaN. A product is summed in float32 in ascending K, like the reference; the hardware's order is its own.
#pragma once
#if defined(__CUDA_ARCH__)  // CUTLASS then compiles its SM100 paths; nvcc does not look into inline assembly
#define CUTLASS_ARCH_MMA_SM100_ENABLED 1
#define CUTLASS_ARCH_MMA_SM100A_ENABLED 1
#endif
#include <cuda.h>
#include <cuda_runtime.h>

#include "../../csrc/kernels/formats.h"

namespace emulation {

constexpr int kCtas = 256, kLanes = 128, kColumns = 512, kAtom = 64;  // an MMA takes 64 values of K
__device__ uint32_t tensor_memory[kCtas][kLanes][kColumns];
__device__ float decoded[kCtas][kLanes][kAtom];  // an MMA's first operand; one MMA a CTA at a time

struct Cta {  // of the cluster; clusters lie along x
  uint32_t rank;
  __device__ static uint32_t own_rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
  }
  __device__ uint32_t index() const { return blockIdx.x + gridDim.x * blockIdx.y + rank - own_rank(); }
  __device__ uint32_t* cell(uint32_t lane, uint32_t column) const {
    return &tensor_memory[index()][lane][column % kColumns];
  }
  __device__ uint32_t shared(uint32_t address) const {
    uint32_t r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
  }
  __device__ uint32_t load(uint32_t address) const {
    uint32_t r;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(r) : "r"(shared(address)) : "memory");
    return r;
  }
};

// A shared-memory descriptor of packed codes, K-major, 128-byte swizzle: rows of 128 bytes, in groups of 8.
struct Operand {
  uint32_t start, group_bytes;
  __device__ explicit Operand(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        group_bytes(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 61 != 2) __trap();  // not that swizzle
  }
  // Eight codes from value k on, k a multiple of 8.
  __device__ uint32_t codes(Cta cta, int row, int k) const {
    const uint32_t address = start + row / 8 * group_bytes + row % 8 * 128 + k / 2;
    return cta.load(address ^ (address >> 7 & 7) << 4);
  }
};

// 64 values of a row times their scales, a 32-bit word of tensor memory.
__device__ inline void decode(const Operand& operand, Cta cta, int row, uint32_t scales, float* to) {
  for (int k = 0; k < kAtom; k += 8) {
    const uint32_t codes = operand.codes(cta, row, k);
    const float scale = nvfp4::e4m3_decode(scales >> k / 16 * 8 & 0x7f);
    for (int i = 0; i < 8; ++i) to[k + i] = nvfp4::e2m1_decode(codes >> 4 * i) * scale;
  }
}

}  // namespace emulation

// `group` CTAs of a cluster (1 or 2) work together; the one that issues leads. Every CTA holds its 128 rows
// of the first operand and its share of the columns of the second.
extern "C" __device__ __noinline__ __attribute__((used)) void emulate_mma(uint32_t group, uint32_t d,
                                                                          uint64_t a, uint64_t b,
                                                                          uint32_t what, uint32_t sfa,
                                                                          uint32_t sfb, uint32_t accumulate) {
  using namespace emulation;
  const int N = static_cast<int>(what >> 17 & 63) * 8, M = static_cast<int>(what >> 24 & 31) * 16;
  if (M != 128 * static_cast<int>(group)) __trap();
  const uint32_t leader = Cta::own_rank() & ~(group - 1);
  for (uint32_t part = 0; part < group; ++part) {
    const Cta cta{leader + part};
    auto* rows = decoded[cta.index()];
    for (int m = 0; m < kLanes; ++m)
      decode(Operand(a), cta, m, __ldcg(cta.cell(m % 32, (sfa & 0xffff) + m / 32)), rows[m]);
    for (int n = 0; n < N; ++n) {
      float column[kAtom];
      const int share = N / static_cast<int>(group);
      decode(Operand(b), Cta{leader + n / share}, n % share,
             __ldcg(cta.cell(n % 32, (sfb & 0xffff) + n / 32)), column);
      for (int m = 0; m < kLanes; ++m) {
        uint32_t* cell = cta.cell((d >> 16) + m, (d & 0xffff) + n);
        float sum = accumulate ? __uint_as_float(__ldcg(cell)) : 0.f;
#pragma unroll
        for (int k = 0; k < kAtom; ++k) sum = fmaf(rows[m][k], column[k], sum);
        __stcg(cell, __float_as_uint(sum));
      }
    }
  }
  __threadfence();
}

// cp.32x128b.warpx4: 32 rows of 16 bytes, to the lanes of all four warps.
extern "C" __device__ __noinline__ __attribute__((used)) void emulate_cp(uint32_t group, uint32_t d,
                                                                         uint64_t descriptor) {
  using namespace emulation;
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t group_bytes = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t leader = Cta::own_rank() & ~(group - 1);
  for (uint32_t part = 0; part < group; ++part) {
    const Cta cta{leader + part};
    for (int r = 0; r < 32; ++r)
      for (int c = 0; c < 4; ++c) {
        const uint32_t word = cta.load(start + r / 8 * group_bytes + r % 8 * 16 + c * 4);
        for (int warp = 0; warp < 4; ++warp) __stcg(cta.cell(32 * warp + r, (d & 0xffff) + c), word);
      }
  }
  __threadfence();
}

// The MMAs before it have ended, so it arrives at once: at the barrier itself, or at its twins in the CTAs of
// `mask`.
extern "C" __device__ __noinline__ __attribute__((used)) void emulate_commit(uint32_t barrier,
                                                                             uint32_t mask) {
  __threadfence();
  for (uint32_t rank = 0; rank < 16; ++rank)
    if (mask >> rank & 1)
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                       emulation::Cta{rank}.shared(barrier))
                   : "memory");
}

// Where lane and column of `address` lie, for the calling lane of the warp: its share of the lane's row comes
// in plain loads behind the call. ld.16x256b gives a lane two neighbours of row lane / 4 and of that + 8.
extern "C" __device__ __noinline__ __attribute__((used)) uint64_t emulate_ld(uint32_t address,
                                                                             uint32_t half) {
  const uint32_t lane = threadIdx.x % 32, row = half ? lane / 4 : lane, column = half ? lane % 4 * 2 : 0;
  const emulation::Cta own{emulation::Cta::own_rank()};
  return __cvta_generic_to_global(own.cell((address >> 16) + row, (address & 0xffff) + column));
}

extern "C" __device__ __noinline__ __attribute__((used)) void emulate_alloc(uint32_t to) {
  const emulation::Cta own{emulation::Cta::own_rank()};
  for (int i = threadIdx.x % 32; i < emulation::kLanes * emulation::kColumns; i += 32)
    __stcg(own.cell(i / emulation::kColumns, i), 0x7fc00000u);
  __threadfence();
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(0) : "memory");
}

// Copies of a pair of CTAs (.cta_group::2) count at the barrier of the pair's leader, which Hopper cannot do
// from the other CTA: there a copy counts at a barrier of its own; when it is complete, its bytes count at
// the leader's. A multicast brings every CTA of `mask` the same bytes, in equal slices, one from each: it is
// a copy of one's own and stores to the other CTAs, and counts in every pair it reaches, once a CTA. A
// stage's copies come one after the other. `bytes`: of all slices.
namespace emulation {
__device__ inline uint32_t own_barrier() {
  __shared__ alignas(1024) uint64_t barrier[128];  // the kernel's own memory lies behind it, swizzled by 1024
  return static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
}
__device__ inline uint32_t slice(uint32_t bytes, uint32_t mask) { return bytes / max(__popc(mask), 1); }

__device__ inline void copy_to(Cta other, uint32_t at, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 16) {
    uint32_t x, y, z, w;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                 : "r"(at + i)
                 : "memory");
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(other.shared(at + i)), "r"(x),
                 "r"(y), "r"(z), "r"(w)
                 : "memory");
  }
}
}  // namespace emulation

extern "C" __device__ __noinline__ __attribute__((used)) uint64_t emulate_copy_begin(uint32_t bytes,
                                                                                     uint32_t mask) {
  const uint32_t own = emulation::own_barrier();
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster; fence.proxy.async;"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(own),
      "r"(emulation::slice(bytes, mask))
      : "memory");
  return own;
}

extern "C" __device__ __noinline__ __attribute__((used)) void emulate_copy_end(uint32_t to, uint32_t barrier,
                                                                               uint32_t bytes,
                                                                               uint32_t mask) {
  using emulation::Cta;
  const uint32_t own = emulation::own_barrier(), rank = Cta::own_rank();
  bytes = emulation::slice(bytes, mask);
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred d; mbarrier.try_wait.parity.shared::cta.b64 d, [%1], 0; selp.u32 %0, 1, 0, d; }"
        : "=r"(done)
        : "r"(own)
        : "memory");
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(own) : "memory");
  const uint32_t here = (barrier & 0xffffffu) | (own & 0xff000000u);  // bits 24 and up name the CTA
  mask = mask ? mask : 1u << rank;
  for (uint32_t other = 0; other < 16; ++other) {
    if (!(mask >> other & 1)) continue;
    if (other != rank) emulation::copy_to(Cta{other}, to, bytes);
    __threadfence();
    asm volatile("mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(
                     Cta{other & ~1u}.shared(here)),
                 "r"(bytes)
                 : "memory");
  }
}
