// AVX-512 with bf16 dot products: 32 values a step, two of them in each of 16 float lanes. vdpbf16ps takes
// subnormal operands for zero and flushes subnormal sums: nothing above 2^-126 in magnitude notices.
#if defined(__x86_64__)
#include <immintrin.h>

#include "gemm_isa.h"

NVFP4_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "gemm_tile.h"

namespace nvfp4::cpu {
namespace {

struct Avx512bf16 {
  using Element = uint16_t;
  using Chunk = __m512i;
  using Acc = __m512;
  static constexpr int kStep = 32;

  struct Table {  // of each scale byte, the 16 products e2m1 * e4m3 in bf16: 8 KB, stays in L1
    alignas(64) uint16_t product[256][16];
    Table() {
      for (int s = 0; s < 256; ++s)
        for (int c = 0; c < 16; ++c) product[s][c] = to_bf16(e2m1_decode(c) * e4m3_decode(s)).bits;
    }
    __m256i of(uint8_t sf) const { return _mm256_load_si256(reinterpret_cast<const __m256i*>(product[sf])); }
  };

  static NVFP4_INLINE Acc zero() { return _mm512_setzero_ps(); }
  static NVFP4_INLINE Chunk load(const Element* from) { return _mm512_load_si512(from); }
  static NVFP4_INLINE void store(Element* to, Chunk x) { _mm512_store_si512(to, x); }
  static NVFP4_INLINE Acc multiply_add(Acc acc, Chunk a, Chunk b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  template <bool half>
  static NVFP4_INLINE Chunk widen(const bf16* from) {
    if constexpr (!half) return _mm512_loadu_si512(from);
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  // Each code becomes a 16-bit index, each block's 16 products half of a register; bit 4 picks the half.
  template <bool half>
  static NVFP4_INLINE Chunk decode(const Table& t, const uint8_t* codes, const uint8_t* sf) {
    const __m128i* from = reinterpret_cast<const __m128i*>(codes);
    const __m512i bytes = _mm512_broadcast_i32x4(half ? _mm_loadl_epi64(from) : _mm_loadu_si128(from));
    const __m512i spread = _mm512_set_epi32(  // byte i to the 16-bit lanes 2i and 2i + 1
        0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
        0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0x00000000);
    const __m512i odd_by_4 = _mm512_set1_epi32(4 << 16), low = _mm512_set1_epi16(15);
    const __m512i second = _mm512_maskz_set1_epi16(0xffff0000u, 16);
    const __m512i nibbles = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), odd_by_4);
    const __m512i index = _mm512_ternarylogic_epi32(nibbles, low, second, 0xea);  // (nibbles & low) | second
    __m512i products = _mm512_zextsi256_si512(t.of(sf[0]));
    if constexpr (!half) products = _mm512_inserti64x4(products, t.of(sf[1]), 1);
    return _mm512_permutexvar_epi16(index, products);
  }

  static NVFP4_INLINE __m512 add_pairs(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  static NVFP4_INLINE void sum4(const Acc* acc, float* out) {
    const __m512d x = _mm512_castps_pd(add_pairs(acc[0], acc[1]));
    const __m512d y = _mm512_castps_pd(add_pairs(acc[2], acc[3]));
    const __m512 quads =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const __m256 pair = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1)));
  }
};

constexpr GemmShape kShapes[] = {
    {1, 1, 8, false, run<Avx512bf16, 1, 8, false>},
    {2, 2, 8, false, run<Avx512bf16, 2, 8, false>},
    // 5 to 8 rows decode twice: 1-8 % faster than 8x2 and 10 % than the panel
    {8, 4, 4, false, run<Avx512bf16, 4, 4, false>},
    {kMaxRows, 4, 6, true, run<Avx512bf16, 4, 6, true>},
};

}  // namespace

const GemmKernels kGemmAvx512bf16 = {"avx512bf16", Avx512bf16::kStep, 2, kShapes, 4, pack<Avx512bf16>};

}  // namespace nvfp4::cpu
NVFP4_TARGET_END
#endif
