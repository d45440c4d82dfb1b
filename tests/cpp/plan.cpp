// csrc/kernels/sm100/plan.h for the tests: plain functions.
#include "../../csrc/kernels/sm100/plan.h"

using namespace nvfp4::blackwell;

extern "C" {
int tiles() { return static_cast<int>(std::size(kTiles)); }
int tokens(int tile) { return kTiles[tile].tokens; }
int sms(int tile) { return kTiles[tile].sms; }
int cluster(int tile) { return kTiles[tile].cluster; }
int chosen(int64_t R, int64_t N, int64_t K, int64_t E) { return choose(R, N, K, E); }
double cycles(int tile, int64_t R, int64_t N, int64_t K, int64_t E) {
  return estimate(kTiles[tile], R, N, K, E).cycles;
}
const char* bound(int tile, int64_t R, int64_t N, int64_t K, int64_t E) {
  return estimate(kTiles[tile], R, N, K, E).bound;
}
}
