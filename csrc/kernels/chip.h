// How a chip library (libnvfp4_sm90.so, ...) brings its kernels: it fills a Chip and hands it to the core
// from a static initialiser, when it is loaded. The core then prefers them to its own CUDA kernels on devices
// of that generation.
#pragma once
#include <string>

#include "params.h"

typedef struct CUstream_st* cudaStream_t;

namespace nvfp4 {

struct Chip {
  const char* name;                         // "sm90"
  int major;                                // compute capability it serves, 9 for 9.x
  bool (*takes)(const GemmParams&);         // whether grouped_gemm can; the core's own kernel takes the rest
  int64_t (*workspace)(const GemmParams&);  // bytes
  void (*grouped_gemm)(const GemmParams&, void* workspace, cudaStream_t);
  std::string (*gemm_plan)(int64_t R, int64_t N, int64_t K, int64_t E, bool packed_a);
  // A layer's two products, both taken as they are, in one launch, the second one's `a` being the first one's
  // `out`. Null: never.
  bool (*takes_pair)(const GemmParams& first, const GemmParams& second);
  int64_t (*pair_workspace)(const GemmParams& first, const GemmParams& second);
  void (*pair)(const GemmParams& first, const GemmParams& second, void* workspace, cudaStream_t);
};

}  // namespace nvfp4

// C names, so that a library finds them however it was linked. The Chip must outlive the process's last call.
extern "C" __attribute__((visibility("default"))) void nvfp4_register_chip(const nvfp4::Chip* chip);
extern "C" __attribute__((visibility("default"))) const nvfp4::Chip* nvfp4_chip_for(int major);  // null: none
