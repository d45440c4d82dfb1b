#include "launch_tile.cuh"

void nvfp4::sm90::launch_8s(const Product& product, cudaStream_t stream) {
  launch_tile<Tile8s>(product, stream);
}
