// What a grouped launch of CUTLASS reads of every expert, and how it is filled; host and device, so that the
// tests' shadow executor gets the same arrays.
//
// An expert's weights are the M operand and its tokens the N operand, whatever the number of tokens: D [N, R]
// is then column-major, the contract's out [R, N]. Tokens as M would never win: an output tile of the same
// area moves the same bytes either way round, but M comes in steps of 128 (or 256) and N in steps of 64.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

#include "../params.h"

namespace nvfp4::blackwell {

using SfConfig = cutlass::detail::Sm1xxBlockScaledConfig<kBlock>;
using Shape = cute::Shape<int, int, int>;                       // rows of weights, tokens, K
using KMajor = cute::Stride<int64_t, cute::_1, cute::_0>;       // weights and tokens
using ColumnMajor = cute::Stride<cute::_1, int64_t, cute::_0>;  // D
using SfBlocks = decltype(SfConfig::deduce_layoutSFA());

// The rows of an expert, and where its scales begin: in units of atom rows (128 rows of scales).
struct Segment {
  int begin, rows;
  int64_t atom;

  static NVFP4_HD int64_t atoms(int64_t rows) { return (rows + 127) / 128; }
};

// Offsets that lie (descending, beyond R) are cut to segments that lie one behind the other inside R: `from`
// is where the furthest one before ends, `atom` how many atom rows they have.
NVFP4_HD Segment segment_of(const GemmParams& p, int64_t e, int from, int64_t atom) {
  const int R = static_cast<int>(p.R);
  if (!p.offsets) return {0, R, 0};
  const int lower = p.offsets[e] > from ? p.offsets[e] : from,
            end = p.offsets[e + 1] < R ? p.offsets[e + 1] : R;
  return end > lower ? Segment{lower, end - lower, atom} : Segment{from, 0, atom};
}

struct Groups {  // arrays of E
  Shape* shape;
  const uint8_t **weights, **tokens, **weights_sf, **tokens_sf;
  bf16** out;
  KMajor *weights_stride, *tokens_stride;
  ColumnMajor* out_stride;
  SfBlocks *weights_blocks, *tokens_blocks;
  int32_t* begin;  // first row of the expert in out and a_scale

  // Lays the arrays out behind one another from `at` on (null: only counts) and returns their bytes.
  static int64_t carve(uint8_t* at, int64_t E, Groups& g) {
    int64_t used = 0;
    const auto take = [&]<class T>(T*& array) {
      array = reinterpret_cast<T*>(at + used);
      used += (E * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    };
    take(g.shape), take(g.weights), take(g.tokens), take(g.weights_sf), take(g.tokens_sf), take(g.out);
    take(g.weights_stride), take(g.tokens_stride), take(g.out_stride);
    take(g.weights_blocks), take(g.tokens_blocks), take(g.begin);
    return used;
  }

  // `sf`: the tokens' scales, every expert's from an atom row of its own on (SfGroups).
  NVFP4_HD void fill(const GemmParams& p, const uint8_t* sf, int64_t e, const Segment& s) const {
    const int N = static_cast<int>(p.N), K = static_cast<int>(p.K);
    const int64_t S = p.K / kBlock;
    shape[e] = {N, s.rows, K};
    weights[e] = p.b + e * p.N * (p.K / 2);
    tokens[e] = p.a_packed + s.begin * (p.K / 2);
    weights_sf[e] = p.b_sf + e * SfLayout{p.N, S}.cosize();
    tokens_sf[e] = sf + s.atom * SfLayout{1, S}.cosize();
    out[e] = p.out + s.begin * p.N;
    weights_stride[e] = tokens_stride[e] = {p.K, {}, {}};
    out_stride[e] = {{}, p.N, {}};
    weights_blocks[e] = SfConfig::tile_atom_to_shape_SFA(cute::make_shape(N, s.rows, K, 1));
    tokens_blocks[e] = SfConfig::tile_atom_to_shape_SFB(cute::make_shape(N, s.rows, K, 1));
    begin[e] = s.begin;
  }
};

NVFP4_HD float read(const float* x) {
#ifdef __CUDA_ARCH__
  return __ldg(x);
#else
  return *x;
#endif
}

// What becomes of a sum: bf16((acc * alpha) * a_scale + bias), each step rounded, as GemmParams says.
struct Epilogue {
  const float *alpha, *a_scale, *bias;
  const int32_t* begin;
  int64_t alphas;
  int N;
  bool a_scale_per_row;

  static Epilogue of(const GemmParams& p, const Groups& g) {
    return {p.alpha, p.a_scale, p.bias, g.begin, p.alphas, static_cast<int>(p.N), p.a_scale_per_row};
  }
  // What a value takes of column n (of N) and of a row of the whole product.
  NVFP4_HD float alpha_of(int64_t e, int n) const {
    return read(alpha + e * alphas + (alphas == 1 ? 0 : alphas == 2 ? n >= N / 2 : n));
  }
  NVFP4_HD float scale_of(int row) const { return read(a_scale + (a_scale_per_row ? row : 0)); }
  NVFP4_HD float bias_of(int64_t e, int n) const { return read(bias + e * N + n); }
};

}  // namespace nvfp4::blackwell
