// Which tile a product gets: a model of the chip, not a measurement (nothing here has run on a Blackwell).
// Host only, no CUDA.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>

namespace nvfp4::blackwell {

// B200 as published: 148 SMs, 8 TB/s, 9 PFLOP/s dense in NVFP4; 1.85 GHz; shared memory 128 bytes a cycle.
// What reaches an SM is taken from Hopper; what L2 gives for it is A100's published 5120 bytes a cycle over
// Hopper's 132 SMs. That it is the smaller of the two is what clusters of four are for.
struct B200 {
  static constexpr double kSms = 148, kHz = 1.85e9;
  static constexpr double kDramBytes = 8e12 / kHz;                             // a cycle, all SMs
  static constexpr double kMacs = 9e15 / 2 / kHz / kSms;                       // a cycle and SM: 16,400
  static constexpr double kSharedBytes = 128, kPortBytes = 64, kL2Bytes = 39;  // a cycle and SM
  static constexpr double kFill = 1500;  // cycles before the first product of a wave
};

// `sms` SMs work on a tile; a cluster's tiles lie one below the other in the weights and share their tokens.
struct Tile {
  int tokens, sms, cluster;
  const char* why;
};
constexpr Tile kTiles[] = {
    {64, 1, 1, "few rows: the least shared memory beside the weights, so the deepest pipeline"},
    {128, 1, 1, "a row count between: half the products of 256 where an expert's rows end early"},
    {256, 1, 1, "many rows, few tiles: one SM's share of N is not doubled"},
    {256, 2, 2, "many rows: two SMs read each other's half of the tokens, so each moves a third less"},
    {256, 2, 4, "many rows of 512 weights: two pairs get their tokens from L2 by one multicast"},
};

struct Estimate {
  double cycles;
  const char* bound;  // by what
};

// R rows spread evenly over the experts they reach.
inline Estimate estimate(const Tile& t, int64_t R, int64_t N, int64_t K, int64_t E) {
  const double value = 9.0 / 16;  // bytes: half for the code, a sixteenth for its scale
  const int64_t experts = std::max<int64_t>(std::min(E, R), 1), rows = (R + experts - 1) / experts;
  const auto parts = [](int64_t of, int64_t by) { return static_cast<double>((of + by - 1) / by); };
  const double tiles = experts * parts(N, 128 * t.cluster) * parts(rows, t.tokens);  // of a cluster
  const double waves = parts(static_cast<int64_t>(tiles), static_cast<int64_t>(B200::kSms / t.cluster));
  const double mine = 128 + t.tokens / t.sms;              // rows of operands that an SM holds
  const double there = std::min<int64_t>(t.tokens, rows);  // of a tile's tokens; nobody sends the others
  const double comes = 128 + there / t.sms, read = 128 + there / t.cluster;  // to an SM; from L2 for it
  const std::pair<double, const char*> per_k = std::max({
      std::pair{128.0 * t.tokens / B200::kMacs, "the tensor cores"},
      std::pair{mine / 2 / B200::kSharedBytes, "shared memory"},
      std::pair{comes * value / B200::kPortBytes, "what an SM receives"},
      std::pair{read * value / B200::kL2Bytes, "what L2 gives an SM"},
  });  // cycles
  const double busy = waves * parts(K, 256) * 256 * per_k.first;
  const double dram = (experts * N * K * value + R * K * value + 2.0 * R * N) / B200::kDramBytes;
  return {std::max(busy, dram) + B200::kFill, dram >= busy ? "memory" : per_k.second};
}

// The cheapest; of equals the first.
inline int choose(int64_t R, int64_t N, int64_t K, int64_t E) {
  int best = 0;
  for (int i = 1; i < static_cast<int>(std::size(kTiles)); ++i)
    if (estimate(kTiles[i], R, N, K, E).cycles < estimate(kTiles[best], R, N, K, E).cycles) best = i;
  return best;
}

inline std::string describe(int64_t R, int64_t N, int64_t K, int64_t E) {
  const Tile& t = kTiles[choose(R, N, K, E)];
  const Estimate e = estimate(t, R, N, K, E);
  const std::string us = std::to_string(e.cycles / B200::kHz * 1e6);
  return "sm100 tcgen05.mma mxf4nvf4, tile " + std::to_string(128 * t.sms) + "x" + std::to_string(t.tokens) +
         " (weights x tokens) on " + std::to_string(t.sms) + " SM" + (t.sms > 1 ? "s" : "") +
         (t.cluster > t.sms ? ", clusters of " + std::to_string(t.cluster) : "") + " (" + t.why +
         "); a model of a B200, never measured: " + us.substr(0, us.find('.') + 2) + " us, bound by " +
         e.bound;
}

}  // namespace nvfp4::blackwell
