#include "launch_tile.cuh"

void nvfp4::sm90::launch_256(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                             cudaStream_t stream) {
  launch_tile<Tile256>(problem, weights, tokens, stream);
}
