// The grouped GEMM's instruction sets: which one a call runs on, and what each provides.
#pragma once
#include "../params.h"

// Between these two, code is compiled for the named features and not for the library's baseline.
#define NVFP4_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define NVFP4_TARGET_BEGIN(features) \
  NVFP4_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define NVFP4_TARGET_END NVFP4_PRAGMA(clang attribute pop)
#else  // GCC 12 takes its own intrinsics' undefined operands for uninitialized ones (GCC bug 105593)
#define NVFP4_TARGET_BEGIN(features)                           \
  NVFP4_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized") \
  NVFP4_PRAGMA(GCC push_options) NVFP4_PRAGMA(GCC target(features))
#define NVFP4_TARGET_END NVFP4_PRAGMA(GCC pop_options)
#endif

namespace nvfp4::cpu {

enum class Isa { avx512bf16, avx2, portable };  // best first; a machine runs every one from best_isa() on
Isa best_isa();
void grouped_gemm_on(Isa, const GemmParams&);

// A rectangle of the product: rows [r0, r1) of expert e, columns [n0, n1), n0 a multiple of 8.
struct GemmItem {
  const GemmParams* p;
  int64_t e, r0, r1, n0, n1;
  const void* a;  // the rows, as `pack` left them
  void* panel;    // room for the decoded columns
};

// The shapes of the inner loop differ in how often a weight is decoded, not in the arithmetic of an output.
struct GemmShape {
  int most;        // rows that it is meant for; the last shape takes every larger count
  int rows, cols;  // outputs held in registers
  bool panel;      // weights are decoded into a buffer for all row tiles, else into registers by each of them
  void (*run)(const GemmItem&);
};

struct GemmKernels {
  const char* name;
  int step;                 // values of K in one step; shorter ends are padded with zeros
  int element_bytes;        // of packed rows and decoded weights
  const GemmShape* shapes;  // ascending
  int num_shapes;
  void (*pack)(const GemmParams&, int64_t r0, int64_t r1, int tile_rows, void* out);
};

constexpr int kMaxPanel = 96;  // columns of an item, at most
constexpr int kMaxRows = 256;  // rows of an item, at most: they make decoding a panel 2 % of their time

extern const GemmKernels kGemmAvx512bf16, kGemmAvx2, kGemmPortable;

}  // namespace nvfp4::cpu
