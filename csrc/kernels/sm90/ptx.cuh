// The Hopper instructions these kernels use and CUDA has no function for: memory barriers, the copy engine.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace nvfp4::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// threadIdx.x, read anew: what is worked out from it need not wait in registers.
__device__ __forceinline__ uint32_t thread_again() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// One lane of a warp; the compiler knows that it is one, and copies take a few instructions then.
__device__ __forceinline__ bool elected() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected;
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;"); }

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// At the barrier in the same place of another CTA of the cluster, or of this one: tensor cores have read what
// its copy engine may write now. (A release to the cluster would be a fence of the whole GPU each time.)
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cta.shared::cluster.b64 _, [there];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Lanes of a warp that arrive for it, after __syncwarp: one would do, but racecheck follows each lane alone.
#ifdef NVFP4_SANITIZE
constexpr uint32_t kArrivals = 32;
#else
constexpr uint32_t kArrivals = 1;
#endif

// The one arrival of a producer, which also announces the bytes that its copies will bring.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool barrier_done(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
      "p;}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_done(barrier, parity)) {
  }
}
// For producers, which mostly wait: a fifth of all instructions issued were their polls without the sleep.
__device__ __forceinline__ void barrier_sleep(uint64_t* barrier, uint32_t parity) {
  while (!barrier_done(barrier, parity)) __nanosleep(64);
}

// Loads from shared memory that stay where they stand: after the barrier that says what is there.
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
__device__ __forceinline__ uint2 load_words(uint32_t address) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(address));
  return words;
}
__device__ __forceinline__ uint4 load_quad(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address));
  return words;
}
__device__ __forceinline__ uint32_t load_byte(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
__device__ __forceinline__ uint32_t load_half(uint32_t address) {
  uint32_t word;
  asm volatile("{.reg .b16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(word) : "r"(address));
  return word;
}

// Four matrices of 8 x 8 16-bit numbers: lane i says where row i % 8 of matrix i / 8 is.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t* to) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}
// One in registers, a pair a lane.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

// 16 rows of weights x 8 tokens, over K 16.
template <class Sums>
__device__ __forceinline__ void multiply_16(Sums& sums, const uint32_t* a, const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums(0)), "+f"(sums(1)), "+f"(sums(2)), "+f"(sums(3))
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four bytes, by the thread itself; zero where `there` is false.
__device__ __forceinline__ void copy_word(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What this thread has read of its CTA's shared memory, the copy engine may overwrite once it is told to.
// (Arriving at a barrier alone overtakes loads that are under way.)
__device__ __forceinline__ void reads_then_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Two matrices of 8 x 8 16-bit numbers, transposed: lane i < 16 says where column i % 8 of matrix i / 8 goes.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&from)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(from[0]),
               "r"(from[1])
               : "memory");
}

__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// A box of a two-dimensional tensor.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

// To the same place of every CTA of a cluster of two, each barrier hearing of its own.
__device__ __forceinline__ void copy_box_to_both(void* to, const CUtensorMap* map, int x, int y,
                                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// `bytes` contiguous ones, a multiple of 16.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Wait for the kernel before this one on the stream. The one after it may come up from lead() on.
__device__ __forceinline__ void follow() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void lead() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void flag_raise(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t flag_read(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void count_raise(uint32_t* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ __forceinline__ int count_read(const uint32_t* count) {
  int value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
  return value;
}
// What other CTAs wrote, and this thread has seen announced, may be read by copies of the copy engine.
__device__ __forceinline__ void generic_then_copies() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// A word of shared memory from one warp to another, without a barrier. (Atomic, or racecheck would not see
// that they mean each other.)
__device__ __forceinline__ void tell(int* word, int value) {
  asm volatile(
      "{.reg .b32 was; atom.exch.release.cta.shared::cta.b32 was, [%0], %1;}" ::"r"(shared_address(word)),
      "r"(value)
      : "memory");
}
__device__ __forceinline__ int hear(int* word) {
  int value;
  asm volatile("atom.or.acquire.cta.shared::cta.b32 %0, [%1], 0;"
               : "=r"(value)
               : "r"(shared_address(word))
               : "memory");
  return value;
}

// All threads of a cluster that have not ended.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace nvfp4::sm90
