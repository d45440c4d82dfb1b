#include "tensor.h"

namespace nvfp4 {

std::string show(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e8m0fnu: return "float8_e8m0fnu";
    case ScalarType::Float4_e2m1fn_x2: return "float4_e2m1fn_x2";
    default: return concat("dtype #", static_cast<int>(dtype));
  }
}

std::string show(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += i ? ", " : "";
    text += shape[i] == kAny ? "*" : std::to_string(shape[i]);
  }
  return text + "]";
}

static std::string show_device(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return concat("cuda:", static_cast<int>(t.get_device_index()));
  return "another device";
}

Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

int64_t size_or_any(const Tensor& t, int64_t i) {
  if (i < 0) i += t.dim();
  return i >= 0 && i < t.dim() ? t.size(i) : kAny;
}

static bool fits(const Shape& got, const Shape& wanted) {
  if (got.size() != wanted.size()) return false;
  for (size_t i = 0; i < got.size(); ++i)
    if (wanted[i] != kAny && got[i] != wanted[i]) return false;
  return true;
}

static void expect_common(const char* op, const char* name, const Tensor& t, const Tensor& home,
                          std::initializer_list<ScalarType> dtypes, const char* symbols, const Shape& wanted,
                          bool shape_fits) {
  bool dtype_fits = false;
  std::string names;
  for (ScalarType d : dtypes) {
    dtype_fits |= t.scalar_type() == d;
    names += (names.empty() ? "" : " | ") + show(d);
  }
  NVFP4_CHECK(dtype_fits && shape_fits, "nvfp4::", op, ": `", name, "` must be ", names, " ", symbols, " = ",
              show(wanted), ", got ", show(t.scalar_type()), " ", show(shape_of(t)));
  NVFP4_CHECK(t.is_cuda() == home.is_cuda() && t.get_device_index() == home.get_device_index(), "nvfp4::", op,
              ": `", name, "` must be on ", show_device(home), " with the other operands, got ",
              show_device(t));
}

void expect(const char* op, const char* name, const Tensor& t, const Tensor& home,
            std::initializer_list<ScalarType> dtypes, const char* symbols, const Shape& wanted) {
  expect_common(op, name, t, home, dtypes, symbols, wanted, fits(shape_of(t), wanted));
}

void expect_tail(const char* op, const char* name, const Tensor& t, const Tensor& home,
                 std::initializer_list<ScalarType> dtypes, const char* symbols, const Shape& tail) {
  const Shape got = shape_of(t);
  const bool long_enough = got.size() >= tail.size();
  const Shape end = long_enough ? Shape(got.end() - tail.size(), got.end()) : got;
  expect_common(op, name, t, home, dtypes, symbols, tail, long_enough && fits(end, tail));
}

static bool starts_at(const Tensor& t, uintptr_t multiple) {
  return !t.is_cuda() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % multiple == 0;
}

void expect_contiguous(const char* op, const char* name, const Tensor& t) {
  NVFP4_CHECK(t.is_contiguous(), "nvfp4::", op, ": `", name, "` must be contiguous, got shape ",
              show(shape_of(t)), " with strides ", show(Shape(t.strides().begin(), t.strides().end())));
}

void expect_weight(const char* op, const char* name, const Tensor& t, int multiple) {
  expect_contiguous(op, name, t);
  NVFP4_CHECK(starts_at(t, multiple), "nvfp4::", op, ": `", name, "` must start at a multiple of ", multiple,
              " bytes, got a view with storage offset ", t.storage_offset());
}

Tensor aligned(const Tensor& t) {
  const Tensor packed = dense(t);
  return starts_at(packed, 16) ? packed : torch::stable::clone(packed);
}

void expect_multiple(const char* op, const char* what, int64_t value, int64_t of) {
  NVFP4_CHECK(value > 0 && value % of == 0, "nvfp4::", op, ": ", what, " must be a positive multiple of ", of,
              ", got ", value);
}

Real real_of(ScalarType dtype) { return dtype == kF32 ? Real::f32 : dtype == kBf16 ? Real::bf16 : Real::f16; }

Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor spread_scale(const char* op, const char* name, const Tensor& scale, const Tensor& home,
                    const Shape& lead) {
  const Shape got = shape_of(scale);
  bool fits = got.size() <= lead.size();
  for (size_t i = 0; fits && i < got.size(); ++i) {
    const int64_t want = lead[lead.size() - got.size() + i];
    fits = got[i] == want || got[i] == 1;
  }
  expect_common(op, name, scale, home, {kF32}, "[] or broadcastable to [..]", lead, fits);
  if (got.empty()) return scale;
  StableIValue stack[3] = {torch::stable::detail::from(scale), torch::stable::detail::from(lead),
                           torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack, TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

}  // namespace nvfp4
