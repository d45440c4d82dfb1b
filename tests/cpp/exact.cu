// The GPU's own sequences of math.h and formats.h against IEEE's operations and the portable formulas, over
// every input they are for: prints "name mismatches", compiled and run by tests/test_cuda.py.
#include <cstdio>

#include "../../csrc/kernels/math.h"

using namespace nvfp4;

struct Reciprocal {  // one binade has every mantissa; the others check the range
  static __device__ bool skip(uint32_t u) { return u < 0x00800000u || u > 0x7e800000u; }
  static __device__ bool same(float x) { return bits_of(reciprocal_inside(x)) == bits_of(__frcp_rn(x)); }
};
struct SquareRoot {
  static __device__ bool skip(uint32_t u) { return u > 0x7f800000u; }
  static __device__ bool same(float x) { return bits_of(sqrt32(x)) == bits_of(__fsqrt_rn(x)); }
};
struct Sixth {  // vector.cuh: amax / 6 of a tame block
  static __device__ bool skip(uint32_t u) { return u < 0x3c000000u || u > 0x45280000u; }  // 2^-7 .. 2688
  static __device__ bool same(float x) {
    const float r = 0x1.555556p-3f, q = x * r;
    return bits_of(fma32(fma32(-6.0f, q, x), r, q)) == bits_of(__fdiv_rn(x, 6.0f));
  }
};
struct SixthOf16Bits {  // the same where BF16 or FP16 is what x comes from
  static __device__ bool skip(uint32_t u) { return u & 0x1fff || Sixth::skip(u); }
  static __device__ bool same(float x) {
    return e4m3_encode(x * 0x1.555556p-3f) == e4m3_encode(__fdiv_rn(x, 6.0f));
  }
};
struct Encode {
  static __device__ bool skip(uint32_t) { return false; }
  static __device__ bool same(float x) { return e4m3_encode(x) == e4m3_encode_portable(x); }
};
struct Decode {
  static __device__ bool skip(uint32_t u) { return u > 255 || (u & 0x7f) == 0x7f; }
  static __device__ bool same(float x) {
    return bits_of(e4m3_decode(bits_of(x))) == bits_of(e4m3_decode_portable(bits_of(x)));
  }
};

template <class Case>
__global__ void count(unsigned long long* mismatches) {
  const uint32_t step = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint64_t u = first; u < uint64_t{1} << 32; u += step) {
    const auto bits = static_cast<uint32_t>(u);
    if (!Case::skip(bits) && !Case::same(float_of(bits))) atomicAdd(mismatches, 1ull);
  }
}

template <class Case>
void run(const char* name) {
  unsigned long long* mismatches;
  unsigned long long found = ~0ull;
  cudaMalloc(&mismatches, 8);
  cudaMemset(mismatches, 0, 8);
  count<Case><<<1024, 256>>>(mismatches);
  cudaMemcpy(&found, mismatches, 8, cudaMemcpyDeviceToHost);
  printf("%s %llu\n", name, cudaGetLastError() == cudaSuccess ? found : ~0ull);
}

int main() {
  run<Reciprocal>("reciprocal");
  run<SquareRoot>("sqrt");
  run<Sixth>("sixth");
  run<SixthOf16Bits>("sixth16");
  run<Encode>("e4m3_encode");
  run<Decode>("e4m3_decode");
}
