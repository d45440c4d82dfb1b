#include "launch.h"

// Lives in libtorch_cuda; a CPU-only torch has none, so the symbol is weak (and the link line says
// --no-as-needed: otherwise nothing pulls libtorch's dependencies in, and the symbol stays null on a CUDA
// torch as well).
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream)
    __attribute__((weak));

namespace nvfp4 {

OnDevice::OnDevice(const Tensor& home) {
  const int32_t device = home.get_device_index();
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard_));
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  stream = static_cast<cudaStream_t>(current);
}

OnDevice::~OnDevice() { aoti_torch_delete_device_guard(guard_); }

}  // namespace nvfp4
