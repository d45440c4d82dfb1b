// The shadow executor in the place of every tile of sm_120.
#include "../../csrc/kernels/sm120/tiles.h"
#include "shadow.cuh"

namespace nvfp4::blackwell {

template <>
Kernel kernel<32>() {
  return {no_workspace, run};
}
template <>
Kernel kernel<64>() {
  return {no_workspace, run};
}
template <>
Kernel kernel<128>() {
  return {no_workspace, run};
}

}  // namespace nvfp4::blackwell
