#include "launch_tile.cuh"

void nvfp4::sm90::launch_pair_8(const Pair& pair, uint32_t* taken, cudaStream_t stream) {
  launch_pair<Tile8>(pair, taken, stream);
}
