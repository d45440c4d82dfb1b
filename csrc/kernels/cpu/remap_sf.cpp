// Scale factors, linear <-> interleaved. Both walk the destination, so every byte of it is written.
#include "kernels.h"

namespace nvfp4::cpu {

void remap_sf(const RemapParams& p) {
  const SfLayout& l = p.layout;
  if (l.cosize() == 0) return;
  const int64_t atoms = l.cosize() / SfLayout::kAtom;
  parallel_for(p.E * atoms, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* src = p.src + i / atoms * l.size();
      for (int64_t byte = i % atoms * SfLayout::kAtom, last = byte + SfLayout::kAtom; byte < last; ++byte) {
        int64_t r, c;
        l.coord(byte, r, c);
        p.dst[i / atoms * l.cosize() + byte] = r < l.rows && c < l.cols ? src[r * l.cols + c] : 0;
      }
    }
  });
}

void unmap_sf(const RemapParams& p) {
  const SfLayout& l = p.layout;
  parallel_for(p.E * l.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* src = p.src + i / l.rows * l.cosize();
      for (int64_t c = 0; c < l.cols; ++c) p.dst[i * l.cols + c] = src[l.offset(i % l.rows, c)];
    }
  });
}

}  // namespace nvfp4::cpu
