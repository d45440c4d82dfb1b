#include "tile.cuh"

template <>
nvfp4::blackwell::Kernel nvfp4::blackwell::kernel<256, 2, 4>() {
  return cutlass_kernel<256, 2, 4>();
}
