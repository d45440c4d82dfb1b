// The shapes a kernel comes in, as types: which one runs is chosen by the table in gemm.cu.
#pragma once
#include <vector_types.h>

#include <cstdint>

#include "gemm_problem.h"

namespace nvfp4::sm90 {

constexpr int kStageSteps = 4;       // steps of K = 64 in a stage of weights
constexpr int kSfColumnBytes = 512;  // an atom of interleaved scales: 128 rows, one step

// A CTA, one a multiprocessor, computes kRows weight rows x kTokens tokens over all of K: kWarpgroups times
// kUnits tiles of 64 rows. A tile pairs `low` rows, the first half of the CTA's, with `high` ones, the second
// half (gate with up): a thread of the MMA holds both of a pair. A team of up to kTeam CTAs, with
// neighbouring weight rows, brings each other the tokens.
template <int kWarpgroups_, int kUnits_, int kLeast_, int kTokens_, int kSlabs_, int kGroup_,
          int kWeightStages_, int kTokenStages_, int kTeam_ = 1>
struct Tile {
  static constexpr int kWarpgroups = kWarpgroups_, kUnits = kUnits_;  // 64-row tiles a warpgroup
  // At most; the MMA's N is the least of kLeast, + kStep, .. that does.
  static constexpr int kTokens = kTokens_, kLeast = kLeast_, kStep = kLeast < kTokens ? kTokens / 4 : kTokens;
  static constexpr int kSlabs = kSlabs_;         // steps of K in a stage of tokens
  static constexpr int kGroup = kGroup_;         // steps decoded and multiplied at once
  static constexpr bool kNarrow = kTokens == 8;  // narrow.cuh multiplies; one ring holds weights and tokens
  static constexpr int kBuffers = 2;             // of decoded operands
  static constexpr int kWeightStages = kWeightStages_, kTokenStages = kTokenStages_;
  static constexpr int kTeam = kTeam_;
  static constexpr int kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 128;
  static constexpr int kProducerRegisters = kWarpgroups == 4 ? 64 : 56;
  static constexpr int kConsumerRegisters =
      (65536 / kThreads / 8 * 8 * (kWarpgroups + 1) - kProducerRegisters) / kWarpgroups / 8 * 8;
  static constexpr int kRows = 64 * kWarpgroups * kUnits, kHalf = kRows / 2;
  static constexpr int kCarried = kUnits * (kTokens / 2 + 1);  // words a consumer hands to the next CTA
  static constexpr int kSlabBytes = kTokens * 128;
  static constexpr int kSlice = kTokens % 32 == 0   ? 32
                                : kTokens % 24 == 0 ? 24
                                                    : kTokens;  // tokens the epilogue stages at once
  // Of a token there: what four warps have of a unit, and what keeps shared memory free of conflicts, as
  // what follows a unit's slice does.
  static constexpr int kOutBytes = 64 + 16, kPlaneBytes = kSlice * kOutBytes + 64;
  static_assert(kWarpgroups * kUnits % 2 == 0, "row mapping works on pairs of 64-row tiles");
  static_assert(!kNarrow || kTokenStages == kWeightStages);
  static_assert(kTeam <= 2 && (kTokens - kLeast) % kStep == 0);
  static_assert(kStageSteps % kSlabs == 0 && kSlabs % kGroup == 0);
  static constexpr int kRound = kNarrow                      ? kStageSteps
                                : kGroup * kBuffers > kUnits ? kGroup * kBuffers / kUnits
                                                             : kGroup;
  static_assert(kSlabs % kRound == 0 || kSlabs == 1, "steps that use every buffer once end with a stage");
};

//                 wgs units tokens slabs group stages of weights, tokens, team
using Tile8s = Tile<2, 1, 8, 8, 4, 1, 8, 8>;
using Tile8 = Tile<4, 1, 8, 8, 4, 1, 4, 4>;
using Tile16 = Tile<4, 1, 16, 16, 4, 2, 4, 4>;
using Tile24 = Tile<4, 1, 24, 24, 4, 1, 3, 4>;
using Tile32 = Tile<4, 1, 32, 32, 4, 1, 3, 4>;
using Tile48 = Tile<4, 1, 48, 48, 4, 1, 3, 3>;
using Tile64 = Tile<4, 1, 64, 64, 2, 1, 3, 4>;
using Tile128 = Tile<2, 2, 64, 128, 1, 1, 2, 7, 2>;
using Tile256 = Tile<2, 1, 128, 256, 1, 1, 2, 5>;

}  // namespace nvfp4::sm90
