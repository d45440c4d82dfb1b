// Weights between the public layout and Hopper's own order, block by block of the latter.
#include <cstring>

#include "../sm90/packed.h"
#include "kernels.h"

namespace nvfp4::cpu {

using namespace sm90;

namespace {

// Calls body(e, first row, first column of scales, byte of the block in the packed weights) for every block.
template <class Body>
void for_blocks(int64_t E, int64_t N, int64_t K, const Body& body) {
  const int64_t columns = packed_columns(K), blocks = N / kPackedRows * columns;
  parallel_for(E * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      body(i / blocks, i % blocks / columns * kPackedRows, i % columns * (kPackedColumns / kBlock),
           i * kPackedBytes);
  });
}

// Calls body(row, column of scales, place) for the 512 places of a block.
template <class Body>
void for_places(const Body& body) {
  for (int row = 0; row < kPackedRows; ++row)
    for (int s = 0; s < kPackedColumns / kBlock; ++s) body(row, s, packed_place(row, s / 4, s % 4));
}

}  // namespace

void pack_sm90(const PackParams& p) {
  const SfLayout sf{p.N, p.K / kBlock};
  for_blocks(p.E, p.N, p.K, [&](int64_t e, int64_t n, int64_t first, int64_t at) {
    uint8_t* block = p.packed + at;
    for_places([&](int row, int s, int place) {
      Words codes{};
      const bool inside = first + s < sf.cols;
      if (inside) std::memcpy(&codes, p.b + ((e * p.N + n + row) * sf.cols + first + s) * 8, 8);
      codes = pack_block(codes);
      std::memcpy(block + place, &codes, 8);
      block[kPackedCodeBytes + place / 8] =
          inside ? p.b_sf[e * sf.cosize() + sf.offset(n + row, first + s)] : 0;
    });
  });
}

void unpack_sm90(const UnpackParams& p) {
  const SfLayout sf{p.N, p.K / kBlock};
  parallel_for(p.E, 1, [&](int64_t begin, int64_t end) {  // the padding; the scales follow
    std::memset(p.b_sf + begin * sf.cosize(), 0, (end - begin) * sf.cosize());
  });
  for_blocks(p.E, p.N, p.K, [&](int64_t e, int64_t n, int64_t first, int64_t at) {
    const uint8_t* block = p.packed + at;
    for_places([&](int row, int s, int place) {
      if (first + s >= sf.cols) return;
      Words codes;
      std::memcpy(&codes, block + place, 8);
      codes = unpack_block(codes);
      std::memcpy(p.b + ((e * p.N + n + row) * sf.cols + first + s) * 8, &codes, 8);
      p.b_sf[e * sf.cosize() + sf.offset(n + row, first + s)] = block[kPackedCodeBytes + place / 8];
    });
  });
}

}  // namespace nvfp4::cpu
