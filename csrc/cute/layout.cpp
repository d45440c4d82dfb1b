// CUTLASS's own scale-factor layouts for NVFP4, evaluated on the host, so that tests hold
// csrc/kernels/formats.h (and the Python side) against the source and not against our reading of it. Host
// only, no kernel.
#include <pybind11/pybind11.h>

#include <cute/tensor.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

namespace {

using Config = cutlass::detail::Sm1xxBlockScaledConfig<16>;  // one scale for 16 values along K

// Operand a: rows = M; operand b: rows = N. Columns of scales are K / 16.
auto layout_a(int rows, int K) { return Config::tile_atom_to_shape_SFA(cute::make_shape(rows, 128, K, 1)); }
auto layout_b(int rows, int K) { return Config::tile_atom_to_shape_SFB(cute::make_shape(128, rows, K, 1)); }

template <class Layout>
pybind11::dict describe(const Layout& layout, int rows, int K) {
  pybind11::list offsets;
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < K; k += 16) offsets.append(static_cast<int64_t>(layout(cute::make_coord(r, k, 0))));
  pybind11::dict out;
  out["size"] =
      static_cast<int64_t>(cute::size(cute::filter_zeros(layout)));  // without the stride-0 mode of a block
  out["cosize"] = static_cast<int64_t>(cute::cosize(layout));
  out["offsets"] = offsets;  // row-major over [rows, K / 16]
  return out;
}

}  // namespace

void bind_shadow(pybind11::module_& m);  // shadow.cpp

PYBIND11_MODULE(_cute, m) {
  m.doc() = "CUTLASS's scale-factor layouts for SF vector size 16.";
  m.def("sfa", [](int rows, int K) { return describe(layout_a(rows, K), rows, K); }, "operand a, [rows, K]");
  m.def("sfb", [](int rows, int K) { return describe(layout_b(rows, K), rows, K); }, "operand b, [rows, K]");
  bind_shadow(m);
}
