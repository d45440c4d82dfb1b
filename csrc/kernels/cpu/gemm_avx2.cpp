// AVX2 with fused multiply-add: blocks of 16 values as two vectors of 8 floats, the even ones and the odd
// ones, because that is how bf16 pairs and code pairs come apart without a shuffle.
#if defined(__x86_64__)
#include <immintrin.h>

#include "gemm_isa.h"

NVFP4_TARGET_BEGIN("avx2,fma")
#include "gemm_tile.h"

namespace nvfp4::cpu {
namespace {

struct Avx2 {
  using Element = float;
  struct Chunk {
    __m256 even, odd;
  };
  using Acc = __m256;
  static constexpr int kStep = 16;

  struct Table {
    float half_scale[256];  // codes are looked up as 2 * e2m1, which is an integer
    Table() {
      for (int s = 0; s < 256; ++s) half_scale[s] = 0.5f * e4m3_decode(s);
    }
  };

  static NVFP4_INLINE Acc zero() { return _mm256_setzero_ps(); }
  static NVFP4_INLINE Chunk load(const Element* from) {
    return {_mm256_load_ps(from), _mm256_load_ps(from + 8)};
  }
  static NVFP4_INLINE void store(Element* to, Chunk x) {
    _mm256_store_ps(to, x.even);
    _mm256_store_ps(to + 8, x.odd);
  }
  static NVFP4_INLINE Acc multiply_add(Acc acc, Chunk a, Chunk b) {
    return _mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, acc));
  }

  template <bool half>
  static NVFP4_INLINE Chunk widen(const bf16* from) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)))};
  }

  static NVFP4_INLINE __m256 scaled(__m128i nibbles, __m256 scale) {
    const __m128i doubled = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    const __m256i values = _mm256_cvtepi8_epi32(_mm_shuffle_epi8(doubled, nibbles));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(values), scale);
  }
  template <bool half>
  static NVFP4_INLINE Chunk decode(const Table& t, const uint8_t* codes, const uint8_t* sf) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
    const __m256 scale = _mm256_broadcast_ss(t.half_scale + *sf);
    const __m128i high = _mm_srli_epi16(bytes, 4);
    return {scaled(_mm_and_si128(bytes, low), scale), scaled(_mm_and_si128(high, low), scale)};
  }

  static NVFP4_INLINE __m256 add_pairs(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  static NVFP4_INLINE void sum4(const Acc* acc, float* out) {
    const __m256d x = _mm256_castps_pd(add_pairs(acc[0], acc[1]));
    const __m256d y = _mm256_castps_pd(add_pairs(acc[2], acc[3]));
    const __m256 quads =
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
  }
};

constexpr GemmShape kShapes[] = {
    // 16 registers: 8 accumulators beside a decode, 12 beside a panel
    {1, 1, 8, false, run<Avx2, 1, 8, false>},
    {2, 2, 4, false, run<Avx2, 2, 4, false>},
    {8, 4, 2, false, run<Avx2, 4, 2, false>},
    {kMaxRows, 4, 3, true, run<Avx2, 4, 3, true>},
};

}  // namespace

const GemmKernels kGemmAvx2 = {"avx2", Avx2::kStep, 4, kShapes, 4, pack<Avx2>};

}  // namespace nvfp4::cpu
NVFP4_TARGET_END
#endif
