#include "launch_tile.cuh"

void nvfp4::sm90::launch_8s(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                            cudaStream_t stream) {
  launch_tile<Tile8s>(problem, weights, tokens, stream);
}
