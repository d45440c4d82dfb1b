#include "tile.cuh"

template <>
nvfp4::blackwell::Kernel nvfp4::blackwell::kernel<256, 2>() {
  return {Cutlass<256, 2>::workspace, Cutlass<256, 2>::run};
}
