// The tiles of sm_120a and sm_121a: 128 rows of weights x so many tokens. The tests put others behind the
// same names: the shadow executor, and these very kernels compiled for Hopper (tests/blackwell_on_hopper).
#pragma once
#include <iterator>

#include "../blackwell/launch.h"

namespace nvfp4::blackwell {

constexpr int kTileTokens[] = {32, 64, 128};

// The smallest that holds an expert's rows, R being spread evenly over the experts they reach. Up to 128 rows
// the weights' way from memory takes longer than the products in any tile (docs/kernels.md), so no model of
// the chip is needed: fewer tokens leave shared memory for one more stage on its way.
inline int choose_tile(int64_t R, int64_t E) {
  const int64_t experts = E < R ? E : R, rows = experts > 0 ? (R + experts - 1) / experts : 0;
  int tile = 0;
  while (tile + 1 < static_cast<int>(std::size(kTileTokens)) && rows > kTileTokens[tile]) ++tile;
  return tile;
}

template <int kTokens>
Kernel kernel();

}  // namespace nvfp4::blackwell
