// The grouped GEMM's inner loops, over a vector policy V; one .cpp per instruction set includes this.
//
// Every output has one vector accumulator with its lanes along K, filled in ascending K over all of K and
// summed by one fixed tree. Tile shapes decide only which outputs are in flight together, so the bits of an
// output depend on its row and column alone, not on R, the tile, the threads or the other rows.
//
// V provides
//   Element, kStep         what packed rows and panels hold, and how many values one Chunk takes
//   Chunk, Acc, Table      kStep values of one row or column; an accumulator; what decoding looks up
//   zero, multiply_add     on accumulators
//   load, store            Chunks, 64-byte aligned
//   decode<half>           codes and scales to a Chunk; half: 16 values and then zeros
//   widen<half>            bf16 values to a Chunk
//   sum4(acc, out)         the sums of four accumulators
//
// In an anonymous namespace, and without std templates inside: code compiled for a newer processor must not
// become the copy that the linker keeps for everyone.
#pragma once
#include "gemm_isa.h"

namespace nvfp4::cpu {
namespace {

#define NVFP4_INLINE inline __attribute__((always_inline))

template <class V>
const typename V::Table& table() {
  static const typename V::Table t;
  return t;
}

template <class V>
NVFP4_INLINE int64_t steps_of(int64_t K) {
  return (K + V::kStep - 1) / V::kStep;
}

// COLS columns from their codes. n0 % COLS == 0 and COLS divides 8, so their scales lie 16 bytes apart.
template <class V, int COLS>
struct CodeColumns {
  const typename V::Table& t;
  const uint8_t* codes[COLS];
  const uint8_t* sf;
  int64_t ahead;  // prefetch distance, 8 columns. Without it R = 1 at N = K = 4096 reads 10 GB/s, with it 22

  NVFP4_INLINE CodeColumns(const GemmParams& p, int64_t e, int64_t n0) : t(table<V>()) {
    const SfLayout layout{p.N, p.K / kBlock};
    for (int j = 0; j < COLS; ++j) {
      const int64_t n = n0 + j < p.N ? n0 + j : p.N - 1;  // past the end: computed, never stored
      codes[j] = p.b + (e * p.N + n) * (p.K / 2);
    }
    ahead = 8 * (p.K / 2);
    sf = p.b_sf + e * layout.cosize() + layout.offset(n0, 0);
  }
  template <bool half>
  NVFP4_INLINE typename V::Chunk chunk(int64_t s, int j) const {
    const int64_t c = s * (V::kStep / kBlock);
    const uint8_t* scale = sf + c / SfLayout::kAtomCols * SfLayout::kAtom + c % SfLayout::kAtomCols + j * 16;
    const uint8_t* from = codes[j] + s * (V::kStep / 2);
    __builtin_prefetch(from + ahead);
    return V::template decode<half>(t, from, scale);
  }
};

// COLS columns from a panel [step][column].
template <class V, int COLS>
struct PanelColumns {
  const typename V::Element* panel;

  template <bool half>
  NVFP4_INLINE typename V::Chunk chunk(int64_t s, int j) const {
    return V::load(panel + (s * COLS + j) * V::kStep);
  }
};

template <class V, int ROWS, int COLS, bool half, class Columns>
NVFP4_INLINE void step(typename V::Acc (&acc)[ROWS * COLS], const typename V::Element* a, const Columns& b,
                       int64_t s) {
  typename V::Chunk w[COLS];
#pragma GCC unroll 8
  for (int j = 0; j < COLS; ++j) w[j] = b.template chunk<half>(s, j);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    const typename V::Chunk x = V::load(a + (s * ROWS + i) * V::kStep);
#pragma GCC unroll 8
    for (int j = 0; j < COLS; ++j) acc[i * COLS + j] = V::multiply_add(acc[i * COLS + j], x, w[j]);
  }
}

// `ahead` is fetched into the cache meanwhile, one line a step.
template <class V, int ROWS, int COLS, class Columns>
NVFP4_INLINE void tile(const typename V::Element* a, const Columns& b, int64_t K, float* out,
                       const typename V::Element* ahead) {
  typename V::Acc acc[ROWS * COLS];
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * COLS; ++i) acc[i] = V::zero();
  const int64_t full = K / V::kStep;
  for (int64_t s = 0; s < full; ++s) {
    __builtin_prefetch(ahead + s * V::kStep);
    step<V, ROWS, COLS, false>(acc, a, b, s);
  }
  if (full * V::kStep < K) step<V, ROWS, COLS, true>(acc, a, b, full);
  float sums[ROWS * COLS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS * COLS; i += 4) V::sum4(acc + i, sums + i);
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLS; ++j) out[i * kMaxPanel + j] = sums[i * COLS + j];
}

template <class V, int COLS>
void decode_panel(const GemmItem& it, typename V::Element* panel) {
  const int64_t K = it.p->K, full = K / V::kStep, steps = steps_of<V>(K);
  for (int64_t n = it.n0; n < it.n1; ++n) {
    const int64_t at = n - it.n0;
    const CodeColumns<V, 1> b(*it.p, it.e, n);
    typename V::Element* to = panel + (at / COLS * COLS * steps + at % COLS) * V::kStep;
    for (int64_t s = 0; s < full; ++s) V::store(to + s * COLS * V::kStep, b.template chunk<false>(s, 0));
    if (full < steps) V::store(to + full * COLS * V::kStep, b.template chunk<true>(full, 0));
  }
}

NVFP4_INLINE int64_t source_row(const GemmParams& p, int64_t r) {
  const int64_t from = p.rows ? p.rows[r] : r;
  return from < 0 ? 0 : from < p.a_rows ? from : p.a_rows - 1;
}

template <class V, bool half>
NVFP4_INLINE typename V::Chunk row_chunk(const GemmParams& p, int64_t from, int64_t s) {
  const int64_t at = from * p.K + s * V::kStep;
  if (p.a) return V::template widen<half>(p.a + at);
  return V::template decode<half>(table<V>(), p.a_packed + at / 2, p.a_sf + at / kBlock);
}

// Rows [r0, r1) as tiles [tile][step][row]; the last tile and the last step are filled up with zeros.
template <class V>
void pack(const GemmParams& p, int64_t r0, int64_t r1, int tile_rows, void* out) {
  const int64_t full = p.K / V::kStep, steps = steps_of<V>(p.K);
  const int64_t padded = (r1 - r0 + tile_rows - 1) / tile_rows * tile_rows;
  for (int64_t i = 0; i < padded; ++i) {
    typename V::Element* to = static_cast<typename V::Element*>(out);
    to += (i / tile_rows * tile_rows * steps + i % tile_rows) * V::kStep;
    const int64_t stride = tile_rows * V::kStep;
    if (r0 + i >= r1) {
      for (int64_t s = 0; s < steps; ++s) V::store(to + s * stride, typename V::Chunk{});
      continue;
    }
    const int64_t from = source_row(p, r0 + i);
    for (int64_t s = 0; s < full; ++s) V::store(to + s * stride, row_chunk<V, false>(p, from, s));
    if (full < steps) V::store(to + full * stride, row_chunk<V, true>(p, from, full));
  }
}

struct Epilogue {
  float alpha[kMaxPanel], bias[kMaxPanel];

  Epilogue(const GemmItem& it) {
    const GemmParams& p = *it.p;
    for (int64_t n = it.n0; n < it.n1; ++n) {
      alpha[n - it.n0] = p.alpha[it.e * p.alphas + n * p.alphas / p.N];
      bias[n - it.n0] = p.bias ? p.bias[it.e * p.N + n] : 0.0f;
    }
  }
  void row(const GemmItem& it, int64_t r, const float* acc) const {
    const GemmParams& p = *it.p;
    const float scale = !p.a_scale ? 1.0f : p.a_scale[p.a_scale_per_row ? source_row(p, r) : 0];
    bf16* out = p.out + r * p.N + it.n0;
    const int64_t n = it.n1 - it.n0;
    if (p.bias) {
      for (int64_t j = 0; j < n; ++j) out[j] = to_bf16(acc[j] * alpha[j] * scale + bias[j]);
    } else {  // adding 0 would turn -0 into 0
      for (int64_t j = 0; j < n; ++j) out[j] = to_bf16(acc[j] * alpha[j] * scale);
    }
  }
};

template <class V, int ROWS, int COLS, bool panel>
void run(const GemmItem& it) {
  using Element = typename V::Element;
  const int64_t K = it.p->K, steps = steps_of<V>(K);
  const Epilogue epilogue(it);
  if (panel) decode_panel<V, COLS>(it, static_cast<Element*>(it.panel));
  float sums[ROWS * kMaxPanel];
  for (int64_t r = it.r0; r < it.r1; r += ROWS) {
    const Element* a = static_cast<const Element*>(it.a) + (r - it.r0) * steps * V::kStep;
    for (int64_t n = it.n0; n < it.n1; n += COLS) {
      float* out = sums + (n - it.n0);
      // column tile by column tile, the rows of the next row tile (worth 5 % at K = 7168)
      const Element* ahead = a + (ROWS + (n - it.n0) / COLS) * steps * V::kStep;
      if constexpr (panel) {
        const Element* columns = static_cast<const Element*>(it.panel) + (n - it.n0) * steps * V::kStep;
        tile<V, ROWS, COLS>(a, PanelColumns<V, COLS>{columns}, K, out, ahead);
      } else {
        tile<V, ROWS, COLS>(a, CodeColumns<V, COLS>(*it.p, it.e, n), K, out, ahead);
      }
    }
    for (int64_t i = 0; i < ROWS && r + i < it.r1; ++i) epilogue.row(it, r + i, sums + i * kMaxPanel);
  }
}

}  // namespace
}  // namespace nvfp4::cpu
