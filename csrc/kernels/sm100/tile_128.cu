#include "tile.cuh"

template <>
nvfp4::blackwell::Kernel nvfp4::blackwell::kernel<128, 1>() {
  return {Cutlass<128, 1>::workspace, Cutlass<128, 1>::run};
}
