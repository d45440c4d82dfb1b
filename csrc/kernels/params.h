// Arguments of every kernel: plain data, a shape on every pointer. No torch.
// T tokens, k experts a token goes to, R rows, E experts, N and K GEMM sizes, S = K/16.
#pragma once
#include "math.h"

namespace nvfp4 {

enum class Real { f32, f16, bf16 };                                                 // activation types
enum class Mxfp4 { best, requantize, verbatim_midpoint, verbatim_search, hybrid };  // conversion methods
enum class Score { softmax, sigmoid, sqrt_softplus };

struct TensorScaleParams {
  const void* x;  // [count]
  Real dtype;
  int64_t count;
  float* scale;  // []
};

struct QuantizeParams {
  const void* x;  // [R, K]
  Real dtype;
  const float* scale;  // [] or [R]
  bool per_row;
  int64_t R, K;
  uint8_t* packed;  // [R, K/2]
  uint8_t* sf;      // [R, S]
};

// Where block-scaled tensor cores read a grouped product's row scales: expert after expert in one interleaved
// buffer, each from an atom of its own on (128 rows), so that every expert's part is a layout of its own.
struct SfGroups {
  const int32_t* offsets;  // [E + 1] as in GemmParams; null: scales are linear, [R, S]
  int64_t E;

  // Room for any offsets: a part's last atom may hold a single row.
  static NVFP4_HD int64_t atom_rows(int64_t R, int64_t E) {
    return R / SfLayout::kAtomRows + (E < R ? E : R);
  }
  static NVFP4_HD int64_t cosize(int64_t R, int64_t E, int64_t S) {
    return atom_rows(R, E) * SfLayout{1, S}.cosize();
  }
};

struct QuantizeRowsParams {
  const void* x;  // [T, K]
  Real dtype;
  const int32_t* rows;  // [R], row r reads x[rows[r]]; null: x[r], R = T
  int64_t T, R, K;
  uint8_t* packed;  // [R, K/2]
  uint8_t* sf;      // [R, S], or [cosize] where `groups` has offsets; rows of no expert then have no scales
  float* scale;     // [R], powers of two
  SfGroups groups;
};

struct DequantizeParams {
  const uint8_t* packed;  // [R, K/2]
  const uint8_t* sf;      // [R, S]
  const float* scale;     // [] or [R]
  bool per_row;
  int64_t R, K;
  void* out;  // [R, K]
  Real dtype;
};

struct RemapParams {  // remap: src linear, dst interleaved; unmap: the other way round
  const uint8_t* src;
  uint8_t* dst;
  int64_t E;
  SfLayout layout;
};

struct PackParams {     // sm90/packed.h
  const uint8_t* b;     // [E, N, K/2]
  const uint8_t* b_sf;  // [E, cosize(N, S)] interleaved
  int64_t E, N, K;
  uint8_t* packed;  // [E, packed_bytes(N, K)]
};

struct UnpackParams {
  const uint8_t* packed;  // [E, packed_bytes(N, K)]
  int64_t E, N, K;
  uint8_t* b;     // [E, N, K/2]
  uint8_t* b_sf;  // [E, cosize(N, S)] interleaved
};

struct Mxfp4Params {
  const uint8_t* packed;  // [E, N, K/2]
  const uint8_t* e8m0;    // [E, N, K/32]
  Mxfp4 method;
  int64_t E, N, K;
  uint8_t* packed_out;  // [E, N, K/2]
  uint8_t* sf;          // [E, N, S]
  float* alpha;         // [E]
};

struct GemmParams {
  const uint8_t* a_packed;  // [.., K/2] and
  const uint8_t* a_sf;      // [.., S], or both null and
  const bf16* a;            // [.., K]
  const float* a_scale;     // [] or [..], null with bf16
  bool a_scale_per_row;
  const int32_t* rows;     // [R], row r of the product reads a[rows[r]]; null: a[r]
  int64_t a_rows;          // rows of a; entries of `rows` are clamped to it
  const int32_t* slots;    // [a_rows, R / a_rows], the inverse of `rows` where it is known: -1 or a row
  const uint8_t* b;        // [E, N, K/2]; packed: [E, packed_bytes(N, K)] of sm90/packed.h, b_sf null
  const uint8_t* b_sf;     // [E, cosize(N, S)] interleaved
  const float* alpha;      // [E, alphas]: column n takes alpha[e][n * alphas / N]
  int64_t alphas;          // 1; 2 (gate, up); N (linear's fused shards)
  const float* bias;       // [E, N] or null
  const int32_t* offsets;  // [E + 1]; null: E = 1 and all R rows belong to it
  bf16* out;               // [R, N]: bf16((acc * alpha) * a_scale + bias); rows of no expert are zero
  int64_t R, N, K, E;

  // What a chip's kernel may fuse or ask for (Chip::takes says whether it does); every other kernel is given
  // none of it.
  bool a_sf_grouped;  // a_sf is [cosize], as SfGroups of offsets; rows is null
  bool activated;     // out is [R, N/2]: the activation of gate (the first N/2 columns) and up
  Act act;
  float act_alpha, limit;
  bool b_packed;                      // b is in Hopper's own order
  bool a_in_k_order, out_in_k_order;  // columns in the chip's own order, from one product to the next
  bool leave_tail;                    // rows of no expert may hold anything
  bool quantize_a;  // `a` is to be quantized row by row before, as quantize_rows does: a_scale is null, and
                    // `rows` come with `slots` or not at all
  const int32_t* ids;    // [R], what permute counted `offsets` from, for experts first_expert .. + E - 1: the
  int64_t first_expert;  // first of two products in one launch does so itself; null: there is no other
};

struct RouteParams {
  const void* logits;  // [T, E]
  Real dtype;
  const float* bias;  // [E] or null
  int64_t T, E;
  int top_k, n_group, topk_group;
  Score score;
  bool renormalize;
  float scale;
  float* weights;  // [T, k]
  int32_t* ids;    // [T, k]
};

struct PermuteParams {
  const int32_t* ids;  // [T, k]
  int64_t T, k, E, first_expert;
  int32_t* rows;     // [T * k]
  int32_t* offsets;  // [E + 1]
  int32_t* slots;    // [T, k]
};

struct SwigluParams {
  const bf16* gate_up;  // [R, 2 I], gate then up; relu2: [R, I]
  Act act;
  float act_alpha, limit;
  int64_t R, I;
  bf16* out;  // [R, I]
};

struct SwigluQuantizeParams {
  SwigluParams swiglu;  // its `out` is not used
  uint8_t* packed;      // [R, I/2]
  uint8_t* sf;          // [R, I/16], or [cosize] where `groups` has offsets
  float* scale;         // [R]
  SfGroups groups;
};

struct CombineParams {
  const bf16* y;         // [R, H]
  const int32_t* slots;  // [T, k]
  const float* weights;  // [T, k]
  int64_t R, H, T, k;
  bf16* out;  // [T, H]
};

}  // namespace nvfp4
