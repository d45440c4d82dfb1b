// Any processor: the AVX2 kernel in vectors of 4 floats, which are one register on SSE2 and on NEON. A
// product of two bf16 values is exact in float32 between 2^-126 and 2^128, so multiplying and then adding has
// the bits of AVX2's fused operation.
#include "gemm_isa.h"
#include "gemm_tile.h"

namespace nvfp4::cpu {
namespace {

struct Portable {
  typedef float Float4 __attribute__((vector_size(16)));
  using Element = float;
  struct Chunk {
    Float4 even[2], odd[2];
  };
  struct Acc {
    Float4 half[2];
  };
  static constexpr int kStep = 16;

  struct Table {
    float scale[256], value[16];
    Table() {
      for (int s = 0; s < 256; ++s) scale[s] = e4m3_decode(s);
      for (int c = 0; c < 16; ++c) value[c] = e2m1_decode(c);
    }
  };

  static NVFP4_INLINE Acc zero() { return {}; }
  static NVFP4_INLINE Chunk load(const Element* from) {
    const Float4* v = reinterpret_cast<const Float4*>(from);
    return {{v[0], v[1]}, {v[2], v[3]}};
  }
  static NVFP4_INLINE void store(Element* to, const Chunk& x) {
    Float4* v = reinterpret_cast<Float4*>(to);
    v[0] = x.even[0], v[1] = x.even[1], v[2] = x.odd[0], v[3] = x.odd[1];
  }
  static NVFP4_INLINE Acc multiply_add(const Acc& acc, const Chunk& a, const Chunk& b) {
    return {{acc.half[0] + a.even[0] * b.even[0] + a.odd[0] * b.odd[0],
             acc.half[1] + a.even[1] * b.even[1] + a.odd[1] * b.odd[1]}};
  }

  template <bool half>
  static NVFP4_INLINE Chunk widen(const bf16* from) {
    alignas(16) float v[16];
    for (int i = 0; i < 8; ++i) v[i] = to_float(from[2 * i]), v[8 + i] = to_float(from[2 * i + 1]);
    return load(v);
  }
  template <bool half>
  static NVFP4_INLINE Chunk decode(const Table& t, const uint8_t* codes, const uint8_t* sf) {
    alignas(16) float v[16];
    const float scale = t.scale[*sf];
    for (int i = 0; i < 8; ++i) v[i] = t.value[codes[i] & 15] * scale;
    for (int i = 0; i < 8; ++i) v[8 + i] = t.value[codes[i] >> 4] * scale;
    return load(v);
  }

  static NVFP4_INLINE float sum(Float4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static NVFP4_INLINE void sum4(const Acc* acc, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = sum(acc[i].half[0]) + sum(acc[i].half[1]);
  }
};

constexpr GemmShape kShapes[] = {
    {1, 1, 4, false, run<Portable, 1, 4, false>},
    {2, 2, 2, false, run<Portable, 2, 2, false>},
    {kMaxRows, 4, 3, true, run<Portable, 4, 3, true>},
};

}  // namespace

const GemmKernels kGemmPortable = {"portable", Portable::kStep, 4, kShapes, 3, pack<Portable>};

}  // namespace nvfp4::cpu
