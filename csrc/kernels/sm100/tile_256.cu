#include "tile.cuh"

template <>
nvfp4::blackwell::Kernel nvfp4::blackwell::kernel<256, 1>() {
  return {Cutlass<256, 1>::workspace, Cutlass<256, 1>::run};
}
