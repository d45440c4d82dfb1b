// The instructions of the kernel that CUDA has no function for.
#pragma once
#include <cstdint>

namespace nvfp4::blackwell {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, zeros where there is nothing to be read; `from` is then any readable address.
__device__ __forceinline__ void copy_async(uint32_t to, const uint8_t* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last kPending groups have arrived, this thread's at least.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// Four matrices of 8 rows x 16 bytes; lane l gives the address of row l % 8 of matrix l / 8, and gets bytes
// 4 (l % 4) .. of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// The way back, of two or four matrices of 8 x 8 16-bit values, transposed: a lane gives two neighbours of
// row l / 4, in columns 2 (l % 4) .., and addresses name columns.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&from)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(from[0]),
               "r"(from[1])
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// d [16, 8] += (a * scales_a) (b * scales_b)^T over 64 values of K. With g = lane / 4, t = lane % 4 a lane
// has
//   a: codes 8 t .. of rows g and g + 8, then of their k + 32; scales of row g (t = 0) or g + 8 (t = 1)
//   b: codes 8 t .. of row g, then of its k + 32; scales of row g (t = 0)
//   d: columns 2 t and 2 t + 1 of row g, then of row g + 8
// A word holds 8 codes or 4 scales, in ascending K.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         uint32_t scales_a, uint32_t scales_b) {
  asm volatile(
      "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, 0}, {%11}, {0, 0};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(scales_a), "r"(scales_b));
}

}  // namespace nvfp4::blackwell
