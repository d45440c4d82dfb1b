// Grouped products on Hopper: which tile runs, its tensor maps, and the chip's entry in the core.
#include <algorithm>
#include <atomic>

#include "../chip.h"
#include "../cuda/kernels.h"
#include "gemm_problem.h"
#include "launch.h"
#include "packed.h"
#include "tile.h"

namespace nvfp4::sm90 {
namespace {

struct Choice {
  const char* name;
  int64_t rows_an_expert, tiles;  // up to which this one runs
  int rows, tokens, team;
  int64_t carried, flags;  // bytes of a CTA's accumulators and of its flags, on their way to the next
  TileLauncher* launch;
  PairLauncher* launch_pair;  // or null
};

template <class T>
constexpr Choice choice(const char* name, int64_t rows_an_expert, int64_t tiles, TileLauncher* launch,
                        PairLauncher* launch_pair = nullptr) {
  return {name,
          rows_an_expert,
          tiles,
          T::kRows,
          T::kTokens,
          T::kTeam,
          T::kCarried * T::kConsumers * static_cast<int64_t>(sizeof(uint32_t)),
          T::kWarpgroups * static_cast<int64_t>(sizeof(uint64_t)),
          launch,
          launch_pair};
}

constexpr int64_t kAny = INT64_MAX;
constexpr Choice kTable[] = {
    // few experts: half the rows, twice the CTAs with work
    choice<Tile8s>("128x8", 5, 132, launch_8s, launch_pair_8s),
    choice<Tile8>("256x8", 5, kAny, launch_8, launch_pair_8),
    choice<Tile16>("256x16", 11, kAny, launch_16),
    choice<Tile24>("256x24", 18, kAny, launch_24),
    choice<Tile32>("256x32", 26, kAny, launch_32),
    choice<Tile48>("256x48", 41, kAny, launch_48),
    choice<Tile64>("256x64", 56, kAny, launch_64),
    choice<Tile128>("256x128", 130, kAny, launch_128),
    choice<Tile256>("128x256", 184, kAny, launch_256),
    choice<Tile128>("256x128", kAny, kAny, launch_128),
};

// By shapes alone: what is routed where is known on the device only.
const Choice& choose(int64_t R, int64_t N, int64_t E) {
  const int64_t hit = std::max<int64_t>(std::min(R, E), 1), rows = (R + E - 1) / std::max<int64_t>(E, 1);
  const Choice* c = kTable;  // whose last takes all
  while (rows > c->rows_an_expert || hit * ((N + c->rows - 1) / c->rows) > c->tiles) ++c;
  return *c;
}

decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                                &result));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}

// Rows of 128-byte swizzled boxes.
CUtensorMap tensor_map(CUtensorMapDataType type, int element_bytes, const void* data, int64_t width,
                       int64_t rows, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(width * element_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / element_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = encoder()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("nvfp4: cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Rows of 16 bytes for the copy engine; a fused activation pairs whole blocks of 64 rows.
bool takes(const GemmParams& p) {
  const bool sizes = p.K > 0 && p.K % 32 == 0 && p.N % 8 == 0 && p.E > 0 && p.E <= kMostExperts;
  const bool index = p.R < INT32_MAX / 2 && p.a_rows < INT32_MAX / 2 && p.E * p.N < INT32_MAX / 2;
  if (p.b_packed && p.N % kPackedRows != 0) return false;
  return sizes && index && !p.a_sf_grouped && aligned16(p.b) && aligned16(p.b_sf) && aligned16(p.out) &&
         aligned16(p.a) && aligned16(p.a_packed) && (!p.activated || (p.act != Act::relu2 && p.N % 128 == 0));
}

// What a product has in its workspace, in this order: tokens in the kernel's order, what CTAs hand on, scales
// of tokens quantized here.
struct Workspace {
  int64_t tokens, carried, flags, scales;  // bytes

  Workspace(const GemmParams& p, const Choice& tile)
      : tokens(p.a_in_k_order ? 0 : p.R * ordered_width(p.K) * static_cast<int64_t>(sizeof(bf16))),
        carried(tile.carried * cuda::sm_count()),
        flags(tile.flags * cuda::sm_count()),
        scales(p.quantize_a ? p.a_rows * static_cast<int64_t>(sizeof(float)) : 0) {}
  int64_t all() const { return tokens + carried + flags + scales; }
};

int64_t workspace(const GemmParams& p) { return Workspace(p, choose(p.R, p.N, p.E)).all(); }

// A number that memory does not hold by chance, other than any launch's before. A graph repeats its own: the
// kernel lowers every flag it raises.
uint64_t next_launch() {
  static std::atomic<uint64_t> launches{0};
  return (launches.fetch_add(1, std::memory_order_relaxed) + 1) * 0x9e3779b97f4a7c15u;
}

// `scratch`: of Workspace(p, tile).
Product product_of(const GemmParams& p, const Choice& tile, void* scratch, cudaStream_t stream) {
  const Workspace bytes(p, tile);
  uint8_t* carried = static_cast<uint8_t*>(scratch) + bytes.tokens;
  const int tile_rows = p.activated ? tile.rows / 2 : tile.rows;
  const int64_t rows = p.activated ? p.N / 2 : p.N;
  const int steps = static_cast<int>(ordered_width(p.K) / 64);
  const int64_t row_tiles = (rows + tile_rows - 1) / tile_rows;
  const int team = row_tiles % tile.team == 0 ? tile.team : 1;
  const int64_t sf_strip = int64_t{steps} * kSfColumnBytes;
  const Problem problem{p,
                        p.activated,
                        tile_rows,
                        static_cast<int>(p.activated ? p.N / 2 : tile_rows / 2),
                        static_cast<int>(row_tiles / team),
                        team,
                        steps,
                        sf_strip,
                        (p.N + 127) / 128 * sf_strip,
                        reinterpret_cast<uint32_t*>(carried),
                        reinterpret_cast<uint64_t*>(carried + bytes.carried),
                        next_launch(),
                        cutlass::FastDivmod(cuda::sm_count() / team),
                        cutlass::FastDivmod((steps + kStageSteps - 1) / kStageSteps),
                        nullptr,
                        0};
#ifdef NVFP4_SANITIZE  // a flag is read while it may be anything: initcheck would say so
  CUDA_CHECK(cudaMemsetAsync(problem.flags, 0, static_cast<size_t>(bytes.flags), stream));
#endif
  const bf16* tokens = p.a_in_k_order ? p.a : static_cast<const bf16*>(scratch);
  return {
      problem,
      p.b_packed ? CUtensorMap{}
                 : tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.b, p.K / 2, p.E * p.N, tile.rows / 2),
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, tokens, ordered_width(p.K), p.R, tile.tokens / team)};
}

void grouped_gemm(const GemmParams& params, void* scratch, cudaStream_t stream) {
  GemmParams p = params;
  if (p.R == 0 || p.a_rows == 0) return;
  const Choice& tile = choose(p.R, p.N, p.E);
  bf16* const tokens = static_cast<bf16*>(scratch);
  if (p.quantize_a) {
    const Workspace bytes(p, tile);
    float* const scales =
        reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + bytes.all() - bytes.scales);
    quantize_tokens(p, scales, tokens, stream);
    p.a_scale = scales;
    p.a_scale_per_row = true;
  } else if (!p.a_in_k_order) {
    order_tokens(p, {}, tokens, stream);
  }
  tile.launch(product_of(p, tile, scratch, stream), stream);
}

// ---- both products of a layer ----------------------------------------------------------------------

// Narrow ones, where permute needs no memory of its own that this launch might be given.
static_assert(cuda::kPermuteAlone < 1 << 15, "Plan counts rows in half a word");
bool takes_pair(const GemmParams& first, const GemmParams& second) {
  const Choice& tile = choose(first.R, first.N, first.E);
  return tile.launch_pair && &tile == &choose(second.R, second.N, second.E) && first.ids && first.activated &&
         first.out_in_k_order && second.a_in_k_order && first.b_packed == second.b_packed &&
         first.leave_tail && second.leave_tail && first.R <= cuda::kPermuteAlone;
}

// Of either product; then how many shares are taken, and of every tile of tokens how far the first product
// is.
struct PairWorkspace {
  int64_t first, second;
  int counts;

  PairWorkspace(const GemmParams& a, const GemmParams& b, const Choice& tile)
      : first(Workspace(a, tile).all()),
        second(Workspace(b, tile).all()),
        counts(static_cast<int>(a.R) + 1) {}
};

int64_t pair_workspace(const GemmParams& first, const GemmParams& second) {
  const PairWorkspace bytes(first, second, choose(first.R, first.N, first.E));
  return bytes.first + bytes.second + bytes.counts * static_cast<int64_t>(sizeof(uint32_t));
}

void both(const GemmParams& first, const GemmParams& second, void* scratch, cudaStream_t stream) {
  if (first.R == 0 || first.a_rows == 0) return;
  const Choice& tile = choose(first.R, first.N, first.E);
  const PairWorkspace bytes(first, second, tile);
  uint8_t* const rest = static_cast<uint8_t*>(scratch) + bytes.first;
  uint32_t* const counts = reinterpret_cast<uint32_t*>(rest + bytes.second);
  Pair pair{{product_of(first, tile, scratch, stream), product_of(second, tile, rest, stream)}};
  Problem &one = pair.product[0].problem, &two = pair.product[1].problem;
  one.finished = two.finished = counts + 1;
  two.awaits = one.row_tiles;
  order_tokens(first, {counts, bytes.counts}, static_cast<bf16*>(scratch), stream);
  tile.launch_pair(pair, counts, stream);
}

std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool packed_a) {
  const Choice& tile = choose(R, N, E);
  const int64_t tiles = (N + tile.rows - 1) / tile.rows * std::max<int64_t>(std::min(R, E), 1);
  return "sm90 " + std::string(tile.name) + " (weight rows x tokens), K " + std::to_string(K) +
         " in steps of 64, " + std::to_string(tiles) + " or more tiles on " +
         std::to_string(cuda::sm_count()) + " CTAs" +
         (packed_a ? ", activations decoded to BF16 before" : "");
}

const Chip kChip{"sm90", 9, takes, workspace, grouped_gemm, gemm_plan, takes_pair, pair_workspace, both};
[[maybe_unused]] const bool registered = (nvfp4_register_chip(&kChip), true);

}  // namespace
}  // namespace nvfp4::sm90
