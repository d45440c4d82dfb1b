// Weights in a chip's own order, and the public layout back.
#include "../kernels/sm90/packed.h"
#include "launch.h"

namespace nvfp4 {

using sm90::kPackedBytes, sm90::kPackedRows, sm90::packed_bytes, sm90::packed_columns;

constexpr int64_t kPackedK = 32;  // what the kernel wants of K

Tensor pack_sm90(const Tensor& b, const Tensor& b_sf) {
  const char* op = "pack_sm90";
  expect_tail(op, "b", b, b, {kU8}, "[.., N, K/2]", {kAny, kAny});
  expect_weight(op, "b", b);
  const int64_t N = b.size(-2), K = 2 * b.size(-1);
  expect_multiple(op, "N, the rows of `b`,", N, kPackedRows);
  expect_multiple(op, "K, twice the last dimension of `b`,", K, kPackedK);
  const Shape lead = lead_of(b, 2);
  expect(op, "b_sf", b_sf, b, {kF8}, "[.., cosize(N, K/16)]", with(lead, {SfLayout{N, K / kBlock}.cosize()}));
  expect_weight(op, "b_sf", b_sf);

  Tensor packed = empty(b, with(lead, {packed_bytes(N, K)}), kU8);
  const PackParams p{in<uint8_t>(b), in<uint8_t>(b_sf), count(lead), N, K, out<uint8_t>(packed)};
  launch(b, p, cpu::pack_sm90, cuda::pack_sm90);
  return packed;
}

std::tuple<Tensor, Tensor> unpack_sm90(const Tensor& packed, int64_t K) {
  const char* op = "unpack_sm90";
  expect_tail(op, "packed", packed, packed, {kU8}, "[.., bytes]", {kAny});
  expect_weight(op, "packed", packed, 16);
  const int64_t N = packed_rows(op, "packed", packed, K);
  const Shape lead = lead_of(packed);

  Tensor b = empty(packed, with(lead, {N, K / 2}), kU8);
  Tensor b_sf = empty(packed, with(lead, {SfLayout{N, K / kBlock}.cosize()}), kF8);
  const UnpackParams p{in<uint8_t>(packed), count(lead), N, K, out<uint8_t>(b), out<uint8_t>(b_sf)};
  launch(packed, p, cpu::unpack_sm90, cuda::unpack_sm90);
  return {b, b_sf};
}

bool is_packed(const Tensor& b, const Tensor& b_sf, int64_t dims) {
  return b.dim() == dims && b_sf.numel() == 0;
}

int64_t packed_rows(const char* op, const std::string& w, const Tensor& b, int64_t K) {
  expect_multiple(op, concat("K of `", w, "`, packed for sm90,").c_str(), K, kPackedK);
  const int64_t rows = packed_columns(K) * kPackedBytes;
  const std::string bytes = concat("the last dimension of `", w, "`, packed for sm90 with K = ", K, ",");
  expect_multiple(op, bytes.c_str(), b.size(-1), rows);
  return b.size(-1) / rows * kPackedRows;
}

void expect_packed(const char* op, const std::string& w, const Tensor& home, const Tensor& b,
                   const Tensor& b_sf, const Shape& lead, int64_t N, int64_t K) {
  const std::string sf = w + "_sf";
  expect_multiple(op, concat("N of `", w, "`, packed for sm90,").c_str(), N, kPackedRows);
  expect(op, w.c_str(), b, home, {kU8}, "packed for sm90, [.., bytes]", with(lead, {packed_bytes(N, K)}));
  expect_weight(op, w.c_str(), b, 16);
  expect(op, sf.c_str(), b_sf, home, {kF8}, concat("empty, as `", w, "` is packed,").c_str(), shape_of(b_sf));
}

}  // namespace nvfp4
