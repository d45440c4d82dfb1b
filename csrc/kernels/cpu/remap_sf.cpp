// Scale factors, linear <-> interleaved. Both walk the destination, so every byte of it is written.
#include "kernels.h"

namespace nvfp4::cpu {

void remap_sf(const RemapParams& p) {
  const SfLayout& l = p.layout;
  const int64_t atoms = l.atom_rows() * l.atom_cols();
  parallel_for(p.E * atoms, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r0 = i % atoms / l.atom_cols() * SfLayout::kAtomRows;
      const int64_t c0 = i % atoms % l.atom_cols() * SfLayout::kAtomCols;
      const uint8_t* src = p.src + i / atoms * l.size();
      for (int byte = 0; byte < SfLayout::kAtom; ++byte) {
        int64_t r, c;
        SfLayout{SfLayout::kAtomRows, SfLayout::kAtomCols}.coord(byte, r,
                                                                 c);  // constants: no division is left
        const bool inside = r0 + r < l.rows && c0 + c < l.cols;
        p.dst[i * SfLayout::kAtom + byte] = inside ? src[(r0 + r) * l.cols + c0 + c] : 0;
      }
    }
  });
}

void unmap_sf(const RemapParams& p) {
  const SfLayout& l = p.layout;
  parallel_for(p.E * l.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* src = p.src + i / l.rows * l.cosize() + l.offset(i % l.rows, 0);
      for (int64_t c = 0; c < l.cols; ++c)  // along a row, from atom to atom
        p.dst[i * l.cols + c] = src[c / SfLayout::kAtomCols * SfLayout::kAtom + c % SfLayout::kAtomCols];
    }
  });
}

}  // namespace nvfp4::cpu
