// Kernels run where their tensors live: on torch's threads, or on the current stream of the tensors' device.
#pragma once
#include "../kernels/cpu/kernels.h"
#include "../kernels/cuda/kernels.h"
#include "ops.h"

namespace nvfp4 {

// The tensors' device is current while this lives, and `stream` is torch's current one on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& home);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  cudaStream_t stream;

 private:
  DeviceGuardHandle guard_;
};

template <class Params>
void launch(const Tensor& home, const Params& p, void (*on_cpu)(const Params&),
            void (*on_cuda)(const Params&, cudaStream_t)) {
  if (home.is_cpu()) return on_cpu(p);
  const OnDevice device(home);
  on_cuda(p, device.stream);
}

// The same with scratch memory from torch's allocator, for kernels that need some on the GPU.
template <class Params>
void launch(const Tensor& home, const Params& p, void (*on_cpu)(const Params&),
            void (*on_cuda)(const Params&, void*, cudaStream_t), int64_t (*workspace)(const Params&)) {
  if (home.is_cpu()) return on_cpu(p);
  const OnDevice device(home);
  Tensor scratch = empty(home, {workspace(p)}, kU8);
  on_cuda(p, out<void>(scratch), device.stream);
}

}  // namespace nvfp4
