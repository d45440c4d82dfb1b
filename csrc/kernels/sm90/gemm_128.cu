#include "launch_tile.cuh"

void nvfp4::sm90::launch_128(const Problem& problem, const CUtensorMap& weights, const CUtensorMap& tokens,
                             cudaStream_t stream) {
  launch_tile<Tile128>(problem, weights, tokens, stream);
}
