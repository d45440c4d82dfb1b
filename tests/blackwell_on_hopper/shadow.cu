// The shadow executor in the place of every tile.
#include "../../csrc/kernels/sm100/tiles.h"
#include "shadow.cuh"

namespace nvfp4::blackwell {

template <>
Kernel kernel<64, 1>() {
  return {no_workspace, run};
}
template <>
Kernel kernel<128, 1>() {
  return {no_workspace, run};
}
template <>
Kernel kernel<256, 1>() {
  return {no_workspace, run};
}
template <>
Kernel kernel<256, 2>() {
  return {no_workspace, run};
}
template <>
Kernel kernel<256, 2, 4>() {
  return {no_workspace, run};
}

}  // namespace nvfp4::blackwell
