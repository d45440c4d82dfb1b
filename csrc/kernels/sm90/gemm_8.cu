#include "launch_tile.cuh"

void nvfp4::sm90::launch_8(const Product& product, cudaStream_t stream) {
  launch_tile<Tile8>(product, stream);
}
