// The set-up of a grouped launch on Blackwell and its shadow executor, on the CPU: the twin of
// csrc/kernels/blackwell/set_up.cuh, for tests that hold (and mutate) every array the CUTLASS launch reads.
#include "../kernels/blackwell/shadow.h"

#include <pybind11/pybind11.h>

#include <vector>

namespace py = pybind11;
using namespace nvfp4;
using namespace nvfp4::blackwell;

namespace {

class Product {
 public:
  // Addresses of contiguous tensors, 0: none.
  explicit Product(const py::dict& d) : p_{} {
    const auto at = [&](const char* name) { return d[name].cast<uintptr_t>(); };
    const auto size = [&](const char* name) { return d[name].cast<int64_t>(); };
    p_.a_packed = reinterpret_cast<const uint8_t*>(at("a"));
    p_.a_sf = reinterpret_cast<const uint8_t*>(at("a_sf"));
    p_.a_scale = reinterpret_cast<const float*>(at("a_scale"));
    p_.a_scale_per_row = size("a_scales") != 1;
    p_.b = reinterpret_cast<const uint8_t*>(at("b"));
    p_.b_sf = reinterpret_cast<const uint8_t*>(at("b_sf"));
    p_.alpha = reinterpret_cast<const float*>(at("alpha"));
    p_.alphas = size("alphas");
    p_.bias = reinterpret_cast<const float*>(at("bias"));
    p_.offsets = reinterpret_cast<const int32_t*>(at("offsets"));
    p_.out = reinterpret_cast<bf16*>(at("out"));
    p_.R = size("R"), p_.N = size("N"), p_.K = size("K"), p_.E = size("E");
    arrays_.resize(Groups::carve(nullptr, p_.E, groups_) / 16 + 1);
    Groups::carve(reinterpret_cast<uint8_t*>(arrays_.data()), p_.E, groups_);
    sf_.resize(SfGroups::cosize(p_.R, p_.E, p_.K / kBlock));
    epilogue_ = Epilogue::of(p_, groups_);
    set_up();
  }

  void run() const {
    for (int64_t e = 0; e < p_.E; ++e)
      for (int n = 0; n < cute::get<0>(groups_.shape[e]); ++n)
        for (int row = 0; row < cute::get<1>(groups_.shape[e]); ++row)
          shadow_value(groups_, epilogue_, e, n, row);
  }

  // The bytes of one of the arrays, to be read and written.
  py::memoryview array(const std::string& name) {
    const auto view = [&](auto* array) {
      return py::memoryview::from_memory(static_cast<void*>(array), p_.E * sizeof(*array));
    };
    if (name == "shape") return view(groups_.shape);
    if (name == "weights") return view(groups_.weights);
    if (name == "tokens") return view(groups_.tokens);
    if (name == "weights_sf") return view(groups_.weights_sf);
    if (name == "tokens_sf") return view(groups_.tokens_sf);
    if (name == "out") return view(groups_.out);
    if (name == "weights_stride") return view(groups_.weights_stride);
    if (name == "tokens_stride") return view(groups_.tokens_stride);
    if (name == "out_stride") return view(groups_.out_stride);
    if (name == "weights_blocks") return view(groups_.weights_blocks);
    if (name == "tokens_blocks") return view(groups_.tokens_blocks);
    if (name == "begin") return view(groups_.begin);
    if (name == "sf") return py::memoryview::from_memory(static_cast<void*>(sf_.data()), sf_.size());
    throw py::key_error(name);
  }

  void skew_alpha(int64_t by) { epilogue_.alpha += by; }

 private:
  void set_up() {
    const SfLayout layout{1, p_.K / kBlock};
    int from = 0;
    int64_t atom = 0;
    for (int64_t e = 0; e < p_.E; ++e) {
      const Segment s = segment_of(p_, e, from, atom);
      groups_.fill(p_, sf_.data(), e, s);
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t c = 0; c < layout.cols; ++c)
          sf_[(atom + r / 128) * layout.cosize() + layout.offset(r % 128, c)] =
              p_.a_sf[(s.begin + r) * layout.cols + c];
      from = s.begin + s.rows;
      atom += Segment::atoms(s.rows);
    }
  }

  GemmParams p_;
  Groups groups_;
  Epilogue epilogue_;
  std::vector<std::max_align_t> arrays_;
  std::vector<uint8_t> sf_;
};

}  // namespace

void bind_shadow(py::module_& m) {
  py::class_<Product>(m, "Product", "The arrays of a grouped launch, and its shadow executor.")
      .def(py::init<const py::dict&>())
      .def("array", &Product::array)
      .def("skew_alpha", &Product::skew_alpha)
      .def("run", &Product::run);
}
