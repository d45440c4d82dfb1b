#include "launch_tile.cuh"

void nvfp4::sm90::launch_256(const Product& product, cudaStream_t stream) {
  launch_tile<Tile256>(product, stream);
}
