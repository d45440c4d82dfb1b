#include "launch_tile.cuh"

void nvfp4::sm90::launch_16(const Product& product, cudaStream_t stream) {
  launch_tile<Tile16>(product, stream);
}
