#include "launch_tile.cuh"

void nvfp4::sm90::launch_24(const Product& product, cudaStream_t stream) {
  launch_tile<Tile24>(product, stream);
}
