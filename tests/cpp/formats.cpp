// formats.h and math.h over arrays, for tests/test_formats_cpp.py.
#include "../../csrc/kernels/math.h"

using namespace nvfp4;

template <class In, class Out, class F>
static void map(const In* in, Out* out, int64_t n, F f) {
  for (int64_t i = 0; i < n; ++i) out[i] = f(in[i]);
}

extern "C" {
void e2m1_decode(const uint8_t* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return e2m1_decode(v); });
}
void e4m3_decode(const uint8_t* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return e4m3_decode(v); });
}
void e8m0_decode(const uint8_t* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return e8m0_decode(v); });
}
void e2m1_encode(const float* x, uint8_t* y, int64_t n) {
  map(x, y, n, [](auto v) { return e2m1_encode(v); });
}
void e4m3_encode(const float* x, uint8_t* y, int64_t n) {
  map(x, y, n, [](auto v) { return e4m3_encode(v); });
}
void e8m0_encode(const float* x, uint8_t* y, int64_t n) {
  map(x, y, n, [](auto v) { return e8m0_encode(v); });
}
void to_bf16(const float* x, uint16_t* y, int64_t n) {
  map(x, y, n, [](auto v) { return to_bf16(v).bits; });
}
void to_f16(const float* x, uint16_t* y, int64_t n) {
  map(x, y, n, [](auto v) { return to_f16(v).bits; });
}
void from_f16(const uint16_t* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return to_float(f16{v}); });
}
void exp32(const float* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return exp32(v); });
}
void sigmoid32(const float* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return sigmoid32(v); });
}
void swish32(const float* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return swish32(v, 1.702f); });
}
void softplus32(const float* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return softplus32(v); });
}
void row_scale(const float* x, float* y, int64_t n) {
  map(x, y, n, [](auto v) { return row_scale(v); });
}
void sf_offset(const int64_t* rc, int64_t* y, int64_t n, int64_t cols) {
  for (int64_t i = 0; i < n; ++i) y[i] = SfLayout{1 << 20, cols}.offset(rc[2 * i], rc[2 * i + 1]);
}
}
