// mxfp4_to_nvfp4: matrix by matrix, rows over the threads. A tensor that loses nothing is read twice and
// written once: the range of its exponents, then its bytes and a table look-up for every scale.
#include "../mxfp4.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace nvfp4::cpu {
namespace {

using namespace mxfp4;

// Values below which a second thread costs more than it brings: at about 1 GB/s, and at 50 MB/s.
constexpr int64_t kGrain = 1 << 17, kSearchGrain = 1 << 12;

struct Matrix {
  const uint8_t* packed;  // [N, K/2]
  const uint8_t* e8m0;    // [N, K/32]
  int64_t N, K;

  const uint8_t* codes_of(int64_t row) const { return packed + row * K / 2; }
  const uint8_t* bytes_of(int64_t row) const { return e8m0 + row * K / 32; }
  int64_t rows_of(int64_t values) const { return std::max<int64_t>(1, values / K); }
};

uint64_t load(const uint8_t* codes) {
  uint64_t word;
  memcpy(&word, codes, 8);
  return word;
}

// ---- statistics -----------------------------------------------------------------------------------

void count_row(const uint8_t* codes, const uint8_t* bytes, int64_t blocks, Stats& stats) {
  for (int64_t b = 0; b < blocks; ++b, codes += 16)
    stats.blocks[bytes[b]] += !is_zero(load(codes) | load(codes + 8)) && bytes[b] <= kMaxByte;
}

void weigh_row(const uint8_t* codes, const uint8_t* bytes, int64_t blocks, Stats& stats) {
  for (int64_t b = 0; b < blocks; ++b, codes += 16) {
    if (bytes[b] > kMaxByte) continue;
    const uint64_t counts = count_magnitudes(load(codes)) + count_magnitudes(load(codes + 8));
    stats.squares[bytes[b]] += squares(counts);
    stats.amax = std::max(stats.amax, e2m1_decode(top_magnitude(counts)) * e8m0_decode(bytes[b]));
  }
}

// Every row through `gather`, added to `stats`. Whole numbers and maxima: the order of threads is no matter.
template <class Gather>
void over_rows(const Matrix& a, Stats& stats, Gather gather) {
  std::mutex mutex;
  parallel_for(a.N, a.rows_of(kGrain), [&](int64_t begin, int64_t end) {
    const auto mine = std::make_unique<Stats>();
    for (int64_t row = begin; row < end; ++row) gather(a.codes_of(row), a.bytes_of(row), a.K / 32, *mine);
    const std::lock_guard lock(mutex);
    for (int i = 0; i < 256; ++i) {
      stats.blocks[i] += mine->blocks[i];
      stats.squares[i] += mine->squares[i];
    }
    stats.amax = std::max(stats.amax, mine->amax);
  });
}

// ---- `best` beyond the window ---------------------------------------------------------------------

// numbers.lane_sum: 32 lanes, then a butterfly.
struct LaneSum {
  double lane[32] = {};

  void add(int64_t i, double x) { lane[i % 32] += x; }
  double total() {
    for (int half = 16; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};

// squared_error by [e8m0 byte][magnitude 1..7][e4m3 byte]; e4m3 bytes 0 and 127 are no scales and never win.
class ErrorTable {
 public:
  static constexpr int kScales = 128;

  ErrorTable(const Stats& stats, Range range, float alpha) : first_(range.kmin + kBias) {
    values_.resize((range.kmax - range.kmin + 1) * kStride, 1e300);
    for (int byte = first_; byte <= range.kmax + kBias; ++byte) {
      if (stats.blocks[byte] == 0) continue;
      for (int v = 1; v < 8; ++v)
        for (int e4m3 = 1; e4m3 < 127; ++e4m3)
          values_[(byte - first_) * kStride + (v - 1) * kScales + e4m3] = squared_error(v, byte, alpha, e4m3);
    }
  }
  const double* of(int byte) const { return values_.data() + (byte - first_) * kStride; }

 private:
  static constexpr size_t kStride = 7 * kScales;
  int first_;
  std::vector<double> values_;
};

// sums[e4m3]: of the counted magnitudes, ascending.
inline void add_errors(const double* table, uint64_t counts, double* sums) {
  double n[8];
  for (int v = 0; v < 8; ++v) n[v] = count_of(counts, v);
  constexpr int S = ErrorTable::kScales;
  for (int i = 0; i < S; ++i)
    sums[i] = n[1] * table[i] + n[2] * table[i + S] + n[3] * table[i + 2 * S] + n[4] * table[i + 3 * S] +
              n[5] * table[i + 4 * S] + n[6] * table[i + 5 * S] + n[7] * table[i + 6 * S];
}

NVFP4_CLONES double least_error(const double* table, uint64_t counts) {
  double sums[ErrorTable::kScales], lane[8];
  add_errors(table, counts, sums);
  for (int j = 0; j < 8; ++j) lane[j] = sums[j];
  for (int i = 8; i < ErrorTable::kScales; i += 8)
    for (int j = 0; j < 8; ++j) lane[j] = sums[i + j] < lane[j] ? sums[i + j] : lane[j];
  return *std::min_element(lane, lane + 8);
}

int best_scale(const double* table, uint64_t counts) {
  double sums[ErrorTable::kScales];
  add_errors(table, counts, sums);
  return static_cast<int>(std::min_element(sums, sums + ErrorTable::kScales) - sums);  // the first of equals
}

struct Kept {  // kept_scale by e8m0 byte
  uint8_t scale[256];
  Kept(Mxfp4 method, const Scale& s) {
    for (int byte = 0; byte < 256; ++byte) scale[byte] = kept_scale(method, s, byte);
  }
};

double row_error(const Matrix& a, int64_t row, const Kept& kept, const ErrorTable& table) {
  const uint8_t *codes = a.codes_of(row), *bytes = a.bytes_of(row);
  LaneSum sum;
  for (int64_t s = 0; s < a.K / kBlock; ++s) {
    const uint64_t half = load(codes + 8 * s);
    const uint8_t byte = bytes[s / 2];
    if (kept.scale[byte] != kQuantize || is_zero(half)) continue;  // no error, or no say
    sum.add(s, least_error(table.of(byte), count_magnitudes(half)));
  }
  return sum.total();
}

double total_error(const Matrix& a, const Scale& scale, const ErrorTable& table) {
  const Kept kept(Mxfp4::best, scale);
  std::vector<double> rows(a.N);
  parallel_for(a.N, a.rows_of(kSearchGrain), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) rows[row] = row_error(a, row, kept, table);
  });
  LaneSum sum;
  for (int64_t row = 0; row < a.N; ++row) sum.add(row, rows[row]);
  return sum.total();
}

Scale best_candidate(const Matrix& a, const Stats& stats, Range range) {
  Scale best{};
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kCandidates && least > 0; ++i) {
    const Scale scale = candidate(stats, range, i);
    const double error = total_error(a, scale, ErrorTable(stats, range, scale.alpha));
    if (error < least) best = scale, least = error;
  }
  return best;
}

// ---- output ---------------------------------------------------------------------------------------

template <class NewCodes>  // (codes, e8m0 byte) -> Recode
void write_row(const Matrix& a, int64_t row, const Kept& kept, NewCodes recode, uint8_t* packed,
               uint8_t* sf) {
  const uint8_t *codes = a.codes_of(row), *bytes = a.bytes_of(row);
  memcpy(packed, codes, a.K / 2);
  for (int64_t b = 0; b < a.K / 32; ++b) {
    const uint64_t half[2] = {load(codes + 16 * b), load(codes + 16 * b + 8)};
    const bool bad = bytes[b] > kMaxByte && !is_zero(half[0] | half[1]);
    for (int h = 0; h < 2; ++h) {
      const uint8_t scale = bad ? kE4m3NaN : is_zero(half[h]) ? kOne : kept.scale[bytes[b]];
      sf[2 * b + h] = scale;
      if (scale != kQuantize) continue;
      const Recode r = recode(half[h], bytes[b]);
      const uint64_t out = r.apply(half[h]);
      memcpy(packed + 16 * b + 8 * h, &out, 8);
      sf[2 * b + h] = r.sf;
    }
  }
}

template <class NewCodes>
void write_matrix(const Matrix& a, const Kept& kept, NewCodes recode, uint8_t* packed, uint8_t* sf) {
  parallel_for(a.N, a.rows_of(kGrain), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      write_row(a, row, kept, recode, packed + row * a.K / 2, sf + row * a.K / kBlock);
  });
}

float convert(const Matrix& a, Mxfp4 method, uint8_t* packed, uint8_t* sf) {
  const auto stats = std::make_unique<Stats>();
  over_rows(a, *stats, count_row);
  const Range range = range_of(*stats);
  const bool searched = (method == Mxfp4::best || method == Mxfp4::verbatim_search) && !range.fits();
  Scale scale{1.0f, true, 0};
  if (!range.empty()) {
    if (searched || method == Mxfp4::requantize) over_rows(a, *stats, weigh_row);
    const bool choose = searched && method == Mxfp4::best;
    scale = choose ? best_candidate(a, *stats, range) : direct_scale(*stats, range, method);
  }
  const Kept kept(method, scale);
  if (searched && method == Mxfp4::best) {
    const ErrorTable table(*stats, range, scale.alpha);
    const auto nearest_codes = [&](uint64_t half, int byte) {
      return recode_nearest(best_scale(table.of(byte), count_magnitudes(half)), byte, scale.alpha);
    };
    write_matrix(a, kept, nearest_codes, packed, sf);
  } else {
    const auto dense_codes = [&](uint64_t half, int byte) {
      return recode_dense(top_magnitude(count_magnitudes(half)), byte, scale.alpha);
    };
    write_matrix(a, kept, dense_codes, packed, sf);
  }
  return scale.alpha;
}

}  // namespace

void mxfp4_to_nvfp4(const Mxfp4Params& p) {
  for (int64_t e = 0; e < p.E; ++e) {
    const int64_t first = e * p.N * p.K;
    const Matrix a{p.packed + first / 2, p.e8m0 + first / 32, p.N, p.K};
    p.alpha[e] = convert(a, p.method, p.packed_out + first / 2, p.sf + first / kBlock);
  }
}

}  // namespace nvfp4::cpu
