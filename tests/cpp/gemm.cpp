// The CPU's grouped GEMM on a chosen instruction set, one thread, for tests/test_gemm_isa.py.
#include "../../csrc/kernels/cpu/gemm_isa.h"
#include "../../csrc/kernels/cpu/kernels.h"

namespace nvfp4::cpu {
void parallel_for(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (n > 0) body(0, n);
}
}  // namespace nvfp4::cpu

extern "C" int best_isa() { return static_cast<int>(nvfp4::cpu::best_isa()); }

extern "C" void gemm(int isa, const void* a, const uint8_t* b, const uint8_t* b_sf, const float* alpha,
                     const int32_t* offsets, void* out, int64_t R, int64_t N, int64_t K, int64_t E) {
  nvfp4::GemmParams p{};
  p.a = static_cast<const nvfp4::bf16*>(a);
  p.b = b;
  p.b_sf = b_sf;
  p.alpha = alpha;
  p.alphas = 1;
  p.offsets = offsets;
  p.out = static_cast<nvfp4::bf16*>(out);
  p.R = p.a_rows = R;
  p.N = N;
  p.K = K;
  p.E = E;
  nvfp4::cpu::grouped_gemm_on(static_cast<nvfp4::cpu::Isa>(isa), p);
}
