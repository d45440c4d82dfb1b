#include "launch_tile.cuh"

void nvfp4::sm90::launch_32(const Product& product, cudaStream_t stream) {
  launch_tile<Tile32>(product, stream);
}
