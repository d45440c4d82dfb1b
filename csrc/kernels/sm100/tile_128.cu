#include "tile.cuh"

template <>
nvfp4::blackwell::Kernel nvfp4::blackwell::kernel<128, 1>() {
  return cutlass_kernel<128, 1>();
}
