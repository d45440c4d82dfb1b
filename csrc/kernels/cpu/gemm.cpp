// The grouped GEMM: which rows belong to whom, how the product is cut into items, and on what they run.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "gemm_isa.h"
#include "kernels.h"

namespace nvfp4::cpu {
namespace {

constexpr int64_t kPanelBytes = 512 << 10;  // of decoded weights: half of a server's L2 cache
constexpr int kColumnStep = 24;             // a multiple of every shape's columns and of 8
constexpr int kMaxTileRows = 8;

const GemmKernels& kernels_of([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512bf16) return kGemmAvx512bf16;
  if (isa == Isa::avx2) return kGemmAvx2;
#endif
  return kGemmPortable;
}

const GemmShape& shape_for(const GemmKernels& kernels, int64_t rows) {
  for (int i = 0; i + 1 < kernels.num_shapes; ++i)
    if (rows <= kernels.shapes[i].most) return kernels.shapes[i];
  return kernels.shapes[kernels.num_shapes - 1];
}

int64_t row_bytes(const GemmKernels& kernels, int64_t K) {
  return (K + kernels.step - 1) / kernels.step * kernels.step * kernels.element_bytes;
}

int64_t panel_columns(const GemmKernels& kernels, int64_t K) {
  const int64_t fit = kPanelBytes / row_bytes(kernels, K) / kColumnStep * kColumnStep;
  return std::clamp<int64_t>(fit, kColumnStep, kMaxPanel);
}

struct Rows {
  int64_t e, begin, end;  // e is -1: no expert's
};

// Maximal runs of one expert's rows, at most kMaxRows each. Where offsets lie and overlap, the last expert
// wins, as if they were computed one after the other.
std::vector<Rows> split_rows(const GemmParams& p) {
  std::vector<int32_t> owner(p.R, p.offsets || p.a_rows == 0 ? -1 : 0);
  for (int64_t e = 0; p.offsets && p.a_rows > 0 && e < p.E; ++e) {
    const int64_t begin = std::clamp<int64_t>(p.offsets[e], 0, p.R);
    const int64_t end = std::clamp<int64_t>(p.offsets[e + 1], begin, p.R);
    std::fill(owner.begin() + begin, owner.begin() + end, static_cast<int32_t>(e));
  }
  std::vector<Rows> runs;
  for (int64_t r = 0; r < p.R; ++r) {
    const bool same = r > 0 && owner[r] == runs.back().e && r - runs.back().begin < kMaxRows;
    if (!same) runs.push_back({owner[r], r, r});
    runs.back().end = r + 1;
  }
  return runs;
}

struct Aligned {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
std::unique_ptr<std::byte[], Aligned> scratch(int64_t bytes) {
  return std::unique_ptr<std::byte[], Aligned>(new (std::align_val_t{64}) std::byte[bytes]);
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

void grouped_gemm_on(Isa isa, const GemmParams& p) {
  const GemmKernels& kernels = kernels_of(isa);
  std::vector<Rows> runs = split_rows(p);
  int64_t most_rows = 0;
  for (const Rows& run : runs) {
    if (run.e < 0) std::fill(p.out + run.begin * p.N, p.out + run.end * p.N, bf16{0});
    if (run.e >= 0) most_rows = std::max(most_rows, run.end - run.begin);
  }
  std::erase_if(runs, [](const Rows& run) { return run.e < 0; });

  const int64_t width = panel_columns(kernels, p.K), across = (p.N + width - 1) / width;
  const int64_t items = static_cast<int64_t>(runs.size()) * across, bytes = row_bytes(kernels, p.K);
  std::atomic<int64_t> next{0};
  // Threads take the next item rather than a fixed share: experts have very different numbers of rows.
  parallel_for(items, 1, [&](int64_t, int64_t) {
    const auto a = scratch((most_rows + kMaxTileRows - 1) * bytes);
    const auto panel = scratch(width * bytes);
    int64_t packed = -1;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const Rows& run = runs[i / across];
      const GemmShape& shape = shape_for(kernels, run.end - run.begin);
      if (packed != i / across) kernels.pack(p, run.begin, run.end, shape.rows, a.get());
      packed = i / across;
      const int64_t n0 = i % across * width;
      shape.run({&p, run.e, run.begin, run.end, n0, std::min(n0 + width, p.N), a.get(), panel.get()});
    }
  });
}

void grouped_gemm(const GemmParams& p) { grouped_gemm_on(best_isa(), p); }

std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool packed_a) {
  const GemmKernels& kernels = kernels_of(best_isa());
  const int64_t rows = std::min<int64_t>(E > 0 ? (R + E - 1) / E : 0, kMaxRows);
  const GemmShape& shape = shape_for(kernels, rows);
  std::string plan = std::string("cpu ") + kernels.name + ", tile " + std::to_string(shape.rows) + "x" +
                     std::to_string(shape.cols) + ", weights decoded " +
                     (shape.panel ? "once per " + std::to_string(kMaxRows) + " rows" : "in registers");
  return plan + ", items of " + std::to_string(std::min(N, panel_columns(kernels, K))) + " columns" +
         (packed_a ? ", activations decoded once" : "");
}

}  // namespace nvfp4::cpu
