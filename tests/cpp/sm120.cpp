// For the tests of sm_120: tests/blackwell_on_hopper/fragments.h against CuTe's layouts of the same
// instruction, and the choice of a tile.
#include <cute/atom/mma_traits_sm120.hpp>

#include "../../csrc/kernels/sm120/tiles.h"
#include "../blackwell_on_hopper/fragments.h"

using Traits =
    cute::MMA_Traits<cute::SM120::BLOCKSCALED::SM120_16x8x64_TN_VS<cute::float_e2m1_t, cute::float_e2m1_t,
                                                                   float, cute::float_ue4m3_t, 16>>;

// Coordinates of a lane's values from CuTe, `rows` to a column; how many of them are held elsewhere.
template <class Layout, class Holds>
static int misplaced(const Layout& layout, int rows, int values, Holds holds) {
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane)
    for (int value = 0; value < values; ++value) {
      const int at = layout(lane, value);
      wrong += !holds(at % rows, at / rows, lane, value);
    }
  return wrong;
}

template <class Layout>
static int misplaced_codes(const Layout& layout, int rows, emulation::Holder (*holder)(int, int)) {
  return misplaced(layout, rows, cute::size<1>(layout), [&](int row, int k, int lane, int value) {
    const auto [l, reg, at] = holder(row, k);
    return l == lane && reg == value / 8 && at == value % 8;
  });
}

// CuTe lets other lanes hold the same scales, which the instruction does not read: `lanes` of each quad are.
template <class Layout>
static int misplaced_scales(const Layout& layout, int rows, int lanes,
                            emulation::Holder (*holder)(int, int)) {
  return misplaced(layout, rows, cute::size<1>(layout), [&](int row, int k, int lane, int value) {
    if (lane % 4 >= lanes) return true;
    const auto [l, reg, at] = holder(row, k);
    return l == lane && reg == 0 && at == value / 16 && k == value;
  });
}

extern "C" {
int tokens_of_tile(int64_t R, int64_t E) {
  return nvfp4::blackwell::kTileTokens[nvfp4::blackwell::choose_tile(R, E)];
}
int codes_of_a() { return misplaced_codes(Traits::ALayout{}, 16, emulation::holder_of_a); }
int codes_of_b() { return misplaced_codes(Traits::BLayout{}, 8, emulation::holder_of_b); }
int scales_of_a() { return misplaced_scales(Traits::SFALayout{}, 16, 2, emulation::holder_of_scale_a); }
int scales_of_b() { return misplaced_scales(Traits::SFBLayout{}, 8, 1, emulation::holder_of_scale_b); }
int sums() {
  return misplaced(Traits::CLayout{}, 16, 4, [](int row, int column, int lane, int value) {
    const auto [l, reg, at] = emulation::holder_of_d(row, column);
    return l == lane && reg == value;
  });
}
}
