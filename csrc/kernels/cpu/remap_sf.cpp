// Scale factors, linear <-> interleaved. Both walk the destination, so every byte of it is written.
#include <algorithm>

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

void group_sf(const SfGroups& groups, const uint8_t* linear, int64_t R, int64_t S, uint8_t* sf) {
  const int64_t atom_rows = SfGroups::atom_rows(R, groups.E), row_bytes = SfLayout{1, S}.cosize();
  std::fill_n(sf, atom_rows * row_bytes, uint8_t{0});
  int64_t first = 0;  // atom row of the expert
  for (int64_t e = 0; e < groups.E; ++e) {
    const int64_t begin = std::clamp<int64_t>(groups.offsets[e], 0, R);
    const int64_t end = std::clamp<int64_t>(groups.offsets[e + 1], begin, R);
    const SfLayout part{end - begin, S};
    for (int64_t r = begin; r < end && first + part.atom_rows() <= atom_rows; ++r)
      for (int64_t c = 0; c < S; ++c) sf[first * row_bytes + part.offset(r - begin, c)] = linear[r * S + c];
    first += part.atom_rows();
  }
}

}  // namespace nvfp4::cpu
