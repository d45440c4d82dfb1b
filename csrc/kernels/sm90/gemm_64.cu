#include "launch_tile.cuh"

void nvfp4::sm90::launch_64(const Product& product, cudaStream_t stream) {
  launch_tile<Tile64>(product, stream);
}
