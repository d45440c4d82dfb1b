#include "launch_tile.cuh"

void nvfp4::sm90::launch_48(const Product& product, cudaStream_t stream) {
  launch_tile<Tile48>(product, stream);
}
