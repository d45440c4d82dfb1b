#include "launch.h"

namespace nvfp4 {

Tensor remap_sf(const Tensor& sf) {
  expect_tail("remap_sf", "sf", sf, sf, {kF8}, "[.., M, S]", {kAny, kAny});
  const Tensor linear = dense(sf);
  const SfLayout layout{sf.size(-2), sf.size(-1)};
  const Shape lead = lead_of(sf, 2);

  Tensor interleaved = empty(sf, with(lead, {layout.cosize()}), kF8);
  const RemapParams p{in<uint8_t>(linear), out<uint8_t>(interleaved), count(lead), layout};
  launch(sf, p, cpu::remap_sf, cuda::remap_sf);
  return interleaved;
}

Tensor unmap_sf(const Tensor& sf, int64_t rows, int64_t cols) {
  NVFP4_CHECK(rows >= 0 && cols >= 0, "nvfp4::unmap_sf: `rows` and `cols` must not be negative, got ", rows,
              " and ", cols);
  const SfLayout layout{rows, cols};
  expect_tail("unmap_sf", "sf", sf, sf, {kF8}, "[.., cosize(rows, cols)]", {layout.cosize()});
  const Tensor interleaved = dense(sf);
  const Shape lead = lead_of(sf);

  Tensor linear = empty(sf, with(lead, {rows, cols}), kF8);
  const RemapParams p{in<uint8_t>(interleaved), out<uint8_t>(linear), count(lead), layout};
  launch(sf, p, cpu::unmap_sf, cuda::unmap_sf);
  return linear;
}

}  // namespace nvfp4
