// Tiles of eight tokens. Instructions bound decode, and here mma.sync takes the fewest: it wants no
// descriptors, and every warp goes its own way, from its first code to its rows of the product (but where
// sums pass from one CTA to the next). Its sums are wgmma's, bit for bit: the same steps of k16 in the same
// order.
#pragma once
#include "carry.cuh"
#include "epilogue.cuh"

namespace nvfp4::sm90 {

template <class Kernel>
struct Narrow {
  using T = typename Kernel::Tile;
  using Weights = typename Kernel::Weights;
  using Accumulator = typename Kernel::template Accumulator<T::kTokens>;
  static_assert(T::kTokens == 8 && T::kUnits == 1 && T::kSlabs == kStageSteps);

  const Kernel kernel;
  const GemmParams& p;
  typename Kernel::Pipe& pipe;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int place = place_of(group, warp, 0);  // of the warp's eight rows, in a half of the tile
  const bool plain = !p.a_scale && !p.bias;
  Item item;
  Factors factors[2][1];  // of the thread's low and high row
  float a_scale[2];       // of its tokens, 2 c and 2 c + 1

  __device__ __forceinline__ Narrow(const Kernel& kernel, typename Kernel::Pipe& pipe)
      : kernel(kernel), p(kernel.p), pipe(pipe) {}

  __device__ __forceinline__ void compute(const Work& work, int n) {
    item = work.item;
    const Part own = work.part;
    const Carried<Kernel> carried(kernel, own, group);
    const bool ends = own.end == kernel.problem.steps;
    Accumulator acc[1];
    uint32_t worst[1] = {};
    cute::clear(acc[0]);
    if (ends) bring_factors();
    if (own.begin > 0) carried.take_over(acc, worst);
    multiply(own, acc[0], worst[0]);
    if (ends)
      finish(acc, worst);
    else
      carried.leave(acc, worst);
    if (!ends || kernel.first()) left(kernel, n);
  }

  // Wanted at the end, asked for before the first product.
  __device__ __forceinline__ void bring_factors() {
    const int N = static_cast<int>(p.N), alphas = static_cast<int>(p.alphas);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = min(kernel.half_row(item, half) + place + row_of(lane / 4), N - 1);
      factors[half][0].alpha = p.alpha[item.expert * alphas + alpha_of(n, alphas, N)];
      if (!plain) factors[half][0].bias = p.bias ? p.bias[item.expert * N + n] : 0.0f;
    }
    if (plain) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(item.first_row + lane % 4 * 2 + i, static_cast<int>(p.R) - 1);
      a_scale[i] = p.a_scale ? kernel.scale_of(row) : 1.0f;
    }
  }

  // A stage of weights brings their tokens along.
  __device__ __forceinline__ void multiply(const Part& own, Accumulator& acc, uint32_t& worst) {
    auto& shared = kernel.shared;
    constexpr int kRawSteps = Weights::kRawSteps;
    const int rows[] = {kernel.half_row(item, 0), kernel.half_row(item, 1)};
    const auto at = Weights::places(kernel.problem, rows, group, warp, lane);
    const int token = lane % 8;
    uint32_t piece = token * 128 + (lane / 8 ^ token) * 16;  // of a slab, swizzled
    keep(piece);
    for (int step = own.begin; step < own.end; step += kStageSteps) {
      barrier_wait(&shared.weights_full[pipe.weights], pipe.weights_parity);
      const Base base = Weights::base(at, shared_address(&shared.weights[pipe.weights]));
      const uint32_t tokens = shared_address(shared.tokens[pipe.weights]) + piece;
      typename Weights::Raw raw = Weights::load(at, base, 0, 0);
#pragma unroll
      for (int s = 0; s < kStageSteps; ++s) {
        const typename Weights::Raw now = raw;
        if (s + 1 < kStageSteps && (s + 1) % kRawSteps == 0) raw = Weights::load(at, base, s + 1, 0);
        uint32_t a[16], b[8];
        load_matrices(tokens + s * T::kSlabBytes, b);
        load_matrices((tokens ^ 64) + s * T::kSlabBytes, b + 4);
        Weights::decode(now, at, s % kRawSteps, step + s, worst, a);
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply_16(acc, a + 4 * k, b + 2 * k);
      }
      kernel.release_weights(pipe);
    }
  }

  __device__ __forceinline__ void finish(Accumulator (&acc)[1], const uint32_t (&worst)[1]) {
    settle(factors, acc, worst);
    if (plain)
      finish<true>(acc[0]);
    else
      finish<false>(acc[0]);
  }

  template <bool plain>
  __device__ __forceinline__ void finish(const Accumulator& acc) const {
    uint32_t pairs[2];  // of tokens, low and high row
#pragma unroll
    for (int half = 0; half < 2; ++half)
      pairs[half] = to_bf16x2(scaled<plain>(acc(2 * half), factors[half][0], a_scale[0], p),
                              scaled<plain>(acc(2 * half + 1), factors[half][0], a_scale[1], p));
    if (!kernel.problem.gated) {
      store<false>(pairs[0], kernel.half_row(item, 0) + place, p.N);
      store<false>(pairs[1], kernel.half_row(item, 1) + place, p.N);
      return;
    }
    const uint32_t pair = activated(pairs[0], pairs[1], p);
    const int first = item.row_tile * T::kHalf;
    if (p.out_in_k_order)
      store<true>(pair, first + group / 2 * 64 + group % 2 * 32 + warp * 2, p.N / 2);
    else
      store<false>(pair, first + place, p.N / 2);
  }

  // Eight rows of weights x eight tokens of a warp become rows of the product, a lane four bytes of one. The
  // lane's two weight rows (row g is row_of(g)) and a neighbour's make two pairs that belong together: (n,
  // n + 1), or (n, n + 4) in the next product's order of K (decode.cuh).
  template <bool k_order>
  __device__ __forceinline__ void store(uint32_t pair, int column, int64_t width) const {
    if (column >= width) return;
    constexpr int kNeighbour = k_order ? 1 : 2;
    const int token = lane / 4, c = lane % 4;
    const uint32_t own = transposed(pair), other = __shfl_xor_sync(~0u, own, kNeighbour);
    const uint32_t word = c & kNeighbour ? __byte_perm(other, own, 0x7632) : __byte_perm(own, other, 0x5410);
    bf16* row = p.out + (item.first_row + token) * width;
    if (token < item.count)
      *reinterpret_cast<uint32_t*>(row + column + (c % 2 * 2 + c / 2) * (k_order ? 8 : 2)) = word;
  }
};

}  // namespace nvfp4::sm90
