// What every op needs of torch: checks that name the operand, shapes in words, pointers, outputs.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/params.h"

// The user's fault: becomes a ValueError.
#define NVFP4_CHECK(cond, ...)                                              \
  do {                                                                      \
    if (!(cond)) throw std::invalid_argument(::nvfp4::concat(__VA_ARGS__)); \
  } while (0)

namespace nvfp4 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

constexpr ScalarType kU8 = ScalarType::Byte, kF8 = ScalarType::Float8_e4m3fn,
                     kE8 = ScalarType::Float8_e8m0fnu;
constexpr ScalarType kF32 = ScalarType::Float, kBf16 = ScalarType::BFloat16, kF16 = ScalarType::Half;
constexpr ScalarType kI32 = ScalarType::Int;
constexpr int64_t kAny = -1;  // in a wanted shape: any size

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string show(ScalarType dtype);
std::string show(const Shape& shape);  // "[2, 3]", kAny as "*"
Shape shape_of(const Tensor& t);

// The size of dimension i, counted from the end if negative; kAny if there is none (the shape check that
// follows then says what was wanted).
int64_t size_or_any(const Tensor& t, int64_t i);

// "nvfp4::op: `name` must be float32 | bfloat16 [E, N] = [2, 8], got int32 [2, 9]"; the operand must also be
// where `home` is. Shapes may hold kAny.
void expect(const char* op, const char* name, const Tensor& t, const Tensor& home,
            std::initializer_list<ScalarType> dtypes, const char* symbols, const Shape& wanted);
// The same for the leading dimensions "..": only the last `tail` dimensions are compared.
void expect_tail(const char* op, const char* name, const Tensor& t, const Tensor& home,
                 std::initializer_list<ScalarType> dtypes, const char* symbols, const Shape& tail);
// Large operands are never copied behind the user's back.
void expect_contiguous(const char* op, const char* name, const Tensor& t);
// And on a GPU at a multiple of so many bytes.
void expect_weight(const char* op, const char* name, const Tensor& t, int multiple = 8);
void expect_multiple(const char* op, const char* what, int64_t value, int64_t of);

Real real_of(ScalarType dtype);

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* in(const std::optional<Tensor>& t) {
  return t ? in<T>(*t) : nullptr;
}
template <class T>
T* out(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Activations may come with any strides; kernels read them packed.
inline Tensor dense(const Tensor& t) { return torch::stable::contiguous(t); }
inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

// The same, on a GPU at a multiple of 16 bytes: the copy engines and 128-bit loads of the GEMMs want no less.
Tensor aligned(const Tensor& t);

// An uninitialised tensor where `like` lives.
Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype);

// A scale [] stays; anything else is broadcast to `lead` and made contiguous.
Tensor spread_scale(const char* op, const char* name, const Tensor& scale, const Tensor& home,
                    const Shape& lead);

inline int64_t count(const Shape& shape) {
  int64_t n = 1;
  for (int64_t s : shape) n *= s;
  return n;
}
inline Shape lead_of(const Tensor& t, int64_t tail = 1) {
  Shape s = shape_of(t);
  s.resize(s.size() - tail);
  return s;
}
inline Shape with(Shape lead, std::initializer_list<int64_t> tail) {
  lead.insert(lead.end(), tail);
  return lead;
}

}  // namespace nvfp4
