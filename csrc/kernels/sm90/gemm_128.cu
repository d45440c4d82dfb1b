#include "launch_tile.cuh"

void nvfp4::sm90::launch_128(const Product& product, cudaStream_t stream) {
  launch_tile<Tile128>(product, stream);
}
