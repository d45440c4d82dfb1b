#include "tile.cuh"

template <>
nvfp4::blackwell::Kernel nvfp4::blackwell::kernel<64, 1>() {
  return {Cutlass<64, 1>::workspace, Cutlass<64, 1>::run};
}
