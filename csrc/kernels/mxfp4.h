// MXFP4 -> NVFP4: what one half block (16 values, one e4m3) and one matrix decide, for host and device.
// nvfp4_moe/reference/mxfp4.py is the definition and explains the methods.
//
// A matrix contributes whole numbers, maxima, and float64 sums in a fixed order: a chip that adds in that
// order picks the same alpha. No libm.
#pragma once
#include "params.h"

namespace nvfp4::mxfp4 {

constexpr int kLow = -9, kHigh = 8;  // the window: 2^p is an e4m3 value for p in kLow .. kHigh
constexpr int kMaxSpread = kHigh - kLow;
constexpr int kBias = 127;
constexpr int kMaxByte = 252;  // above it 6 * 2^k overflows float32
constexpr int kCandidates = 11;
constexpr uint8_t kOne = 0x38;    // e4m3 1.0
constexpr uint8_t kQuantize = 0;  // in place of a scale: the codes change. No kept block has scale 0

NVFP4_HD double two_to(int p) {  // a normal float64
  const uint64_t bits = static_cast<uint64_t>(p + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
NVFP4_HD uint8_t e4m3_two_to(int p) { return static_cast<uint8_t>(p < -6 ? 1 << (p - kLow) : (p + 7) << 3); }
NVFP4_HD int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// ---- 16 codes in a word ---------------------------------------------------------------------------

NVFP4_HD bool is_zero(uint64_t codes) { return (codes & 0x7777777777777777u) == 0; }

// Byte v of the result: how many of the codes have magnitude v. Sums of two results still fit.
NVFP4_HD uint64_t count_magnitudes(uint64_t codes) {
  uint64_t counts = 0;
  for (int i = 0; i < 64; i += 4) counts += uint64_t{1} << ((codes >> i & 7) * 8);
  return counts;
}
NVFP4_HD int count_of(uint64_t counts, int v) { return static_cast<int>(counts >> (8 * v) & 255); }
NVFP4_HD int top_magnitude(uint64_t counts) {
  int v = 7;
  while (v > 0 && count_of(counts, v) == 0) --v;
  return v;
}
// Sum of (2 * value)^2: whole numbers, so that sums over a matrix are exact in any order.
NVFP4_HD int64_t squares(uint64_t counts) {
  int64_t sum = 0;
  for (int v = 1; v < 8; ++v) {
    const int twice = static_cast<int>(2 * e2m1_decode(v));
    sum += count_of(counts, v) * twice * twice;
  }
  return sum;
}

// ---- what a matrix is asked before alpha is chosen ------------------------------------------------

struct Stats {  // by e8m0 byte, over live blocks: a nonzero code and byte <= kMaxByte
  int64_t blocks[256] = {};
  int64_t squares[256] = {};
  float amax = 0;
};
struct Range {
  int kmin, kmax;  // kmin > kmax: no live block
  NVFP4_HD bool empty() const { return kmin > kmax; }
  NVFP4_HD bool fits() const { return kmax - kmin <= kMaxSpread; }
};
struct Scale {
  float alpha;
  bool is_power;
  int m;  // alpha = 2^m if it is one
};

NVFP4_HD Range range_of(const Stats& s) {
  int low = 0, high = 255;
  while (low <= 255 && s.blocks[low] == 0) ++low;
  while (high >= 0 && s.blocks[high] == 0) --high;
  return {low - kBias, high - kBias};
}

NVFP4_HD int median_k(const Stats& s) {  // the lower one
  int64_t total = 0, below = 0;
  for (int byte = 0; byte < 256; ++byte) total += s.blocks[byte];
  int byte = 0;
  while ((below += s.blocks[byte]) < (total + 1) / 2) ++byte;
  return byte - kBias;
}

// Squared error if every code is kept and scales are clamped to the window.
NVFP4_HD double clamped_error(const Stats& s, Range r, int m) {
  double sum = 0;
  for (int k = r.kmin; k <= r.kmax; ++k) {
    const double d = two_to(k) - two_to(clamp(k, m + kLow, m + kHigh));
    sum += static_cast<double>(s.squares[k + kBias]) * (d * d);
  }
  return sum;
}

NVFP4_HD int search(const Stats& s, Range r) {
  int best = r.kmin - kLow;
  double least = clamped_error(s, r, best);
  for (int m = best + 1; m <= r.kmax - kHigh; ++m) {
    const double error = clamped_error(s, r, m);
    if (error < least) best = m, least = error;
  }
  return best;
}

NVFP4_HD Scale power(int m) { return {static_cast<float>(two_to(m)), true, m}; }

// The i-th alpha that `best` tries when the spread exceeds the window.
NVFP4_HD Scale candidate(const Stats& s, Range r, int i) {
  if (i < 4) return power(r.kmax - kHigh - i);
  if (i < 10) return {static_cast<float>(two_to(r.kmax)) / static_cast<float>(288 + 32 * (i - 4)), false, 0};
  return {s.amax / kTensorMax, false, 0};
}

// What every method but a `best` beyond the window takes.
NVFP4_HD Scale direct_scale(const Stats& s, Range r, Mxfp4 method) {
  if (method == Mxfp4::requantize) return {s.amax / kTensorMax, false, 0};
  // alpha stays a normal float32: where -126 is the larger, every k <= -119 is in its window
  if (method == Mxfp4::hybrid || method == Mxfp4::best) return power(clamp(r.kmax - kHigh, -126, kBias));
  if (r.fits()) return power((r.kmin + r.kmax + 2) >> 1);
  return power(method == Mxfp4::verbatim_midpoint ? median_k(s) + 1 : search(s, r));
}

// ---- half blocks under a chosen alpha -------------------------------------------------------------

// The scale of a nonzero half block by its e8m0 byte: kQuantize, or the one under which its codes are kept.
NVFP4_HD uint8_t kept_scale(Mxfp4 method, const Scale& scale, int byte) {
  if (byte > kMaxByte) return kE4m3NaN;
  if (!scale.is_power) return kQuantize;
  const int p = byte - kBias - scale.m, inside = clamp(p, kLow, kHigh);
  const bool verbatim = method == Mxfp4::verbatim_midpoint || method == Mxfp4::verbatim_search;
  return verbatim || p == inside ? e4m3_two_to(inside) : kQuantize;
}

// The nearest magnitude code of x / step, ties to even. Both sides of every comparison are exact in float64.
NVFP4_HD int nearest(double x, double step) {
  return (x > 0.25 * step) + (x >= 0.75 * step) + (x > 1.25 * step) + (x >= 1.75 * step) + (x > 2.5 * step) +
         (x >= 3.5 * step) + (x > 5.0 * step);
}

NVFP4_HD double step_of(float alpha, int e4m3) { return static_cast<double>(e4m3_decode(e4m3)) * alpha; }
NVFP4_HD double value_of(int v, int byte) { return e2m1_decode(v) * two_to(byte - kBias); }

// What magnitude v at 2^(byte - 127) loses under one e4m3 scale.
NVFP4_HD double squared_error(int v, int byte, float alpha, int e4m3) {
  const double x = value_of(v, byte), step = step_of(alpha, e4m3);
  const double d = x - e2m1_decode(nearest(x, step)) * step;
  return d * d;
}

struct Recode {
  uint8_t sf;
  uint8_t code[8];  // new magnitude code by old one

  NVFP4_HD uint64_t apply(uint64_t codes) const {
    uint64_t out = codes & 0x8888888888888888u;  // signs stay, -0 too
    for (int i = 0; i < 64; i += 4) out |= static_cast<uint64_t>(code[codes >> i & 7]) << i;
    return out;
  }
};

// The rule for dense tensors, in float32.
NVFP4_HD Recode recode_dense(int top, int byte, float alpha) {
  const float unit = e8m0_decode(byte);
  Recode r;
  r.sf = static_cast<uint8_t>(block_scale(e2m1_decode(top) * unit, alpha));
  const float step = e4m3_decode(r.sf) * alpha;
  for (int v = 0; v < 8; ++v) r.code[v] = static_cast<uint8_t>(e2m1_encode(e2m1_decode(v) * unit / step));
  return r;
}

NVFP4_HD Recode recode_nearest(int e4m3, int byte, float alpha) {
  Recode r;
  r.sf = static_cast<uint8_t>(e4m3);
  const double step = step_of(alpha, e4m3);
  for (int v = 0; v < 8; ++v) r.code[v] = static_cast<uint8_t>(nearest(value_of(v, byte), step));
  return r;
}

}  // namespace nvfp4::mxfp4
