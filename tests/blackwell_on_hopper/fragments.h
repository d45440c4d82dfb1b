// Where a value lies among the lanes of a warp for mma.sync m16n8k64 of packed FP4 with a scale for 16
// values: PTX ISA 9, "Matrix Fragments for mma.m16n8k64" and "Block Scaling for mma.sync" with byte and
// thread selectors 0. tests/test_fragments.py compares it with CuTe's layouts.
#pragma once

namespace emulation {

struct Holder {
  int lane, reg, at;  // register of the lane, position in it
};

// Word reg holds 8 codes of row or column of the operand, from k on.
constexpr Holder holder_of_a(int row, int k) {
  return {row % 8 * 4 + k % 32 / 8, k / 32 * 2 + row / 8, k % 8};
}
constexpr Holder holder_of_b(int column, int k) { return {column * 4 + k % 32 / 8, k / 32, k % 8}; }
// One word: the scales of a row's or column's four blocks.
constexpr Holder holder_of_scale_a(int row, int k) { return {row % 8 * 4 + row / 8, 0, k / 16}; }
constexpr Holder holder_of_scale_b(int column, int k) { return {column * 4, 0, k / 16}; }
// A sum of the product.
constexpr Holder holder_of_d(int row, int column) {
  return {row % 8 * 4 + column / 2, row / 8 * 2 + column % 2, 0};
}

}  // namespace emulation
