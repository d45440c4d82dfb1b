// From accumulators to rows of the product: scales, bias and activation in float32, one rounding where the
// composition of operators rounds, then through shared memory into 16-byte pieces.
#pragma once
#include "gemm.cuh"

namespace nvfp4::sm90 {

struct Factors {  // of one weight row
  float alpha, bias;
};

// Weight row n's among its expert's alphas.
template <class Int>
__device__ __forceinline__ int alpha_of(int n, Int alphas, Int N) {
  return alphas == 1 ? 0 : alphas == 2 ? 2 * n >= N : n;
}

// (acc * alpha) * a_scale + bias; `plain`: there is neither a scale nor a bias.
template <bool plain>
__device__ __forceinline__ float scaled(float sum, Factors f, float a_scale, const GemmParams& p) {
  float y = sum * f.alpha;
  if (plain) return y;
  if (p.a_scale) y = y * a_scale;
  return p.bias ? y + f.bias : y;
}

// Sums are in units of 1 / kDecodedUnit: alpha makes up for it or, where it would overflow, they do. And a
// NaN among a row's scales, whose greatest four neighbouring lanes have seen, becomes its alpha.
template <int kUnits, class Accumulator>
__device__ __forceinline__ void settle(Factors (&factors)[2][kUnits], Accumulator (&acc)[kUnits],
                                       const uint32_t (&worst)[kUnits]) {
  bool overflows = false, nan = false;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    overflows |= fmaxf(fabsf(factors[0][u].alpha), fabsf(factors[1][u].alpha)) > 0x1p120f;
    nan |= __vcmpeq2(worst[u], kE4m3NaN * 0x10001u) != 0;
  }
  const bool unit_in_sums = __any_sync(~0u, overflows);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (unit_in_sums) {
#pragma unroll
      for (int i = 0; i < cute::size(acc[u]); ++i) acc[u](i) *= kDecodedUnit;
    } else {
      factors[0][u].alpha *= kDecodedUnit, factors[1][u].alpha *= kDecodedUnit;
    }
  }
  if (!__any_sync(~0u, nan)) return;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    uint32_t bytes = __vmaxu2(worst[u], __shfl_xor_sync(~0u, worst[u], 1));
    bytes = __vmaxu2(bytes, __shfl_xor_sync(~0u, bytes, 2));
    if ((bytes & 0xffff) == kE4m3NaN) factors[0][u].alpha = float_of(0x7fc00000u);
    if (bytes >> 16 == kE4m3NaN) factors[1][u].alpha = float_of(0x7fc00000u);
  }
}

template <Act act>
__device__ __forceinline__ uint32_t activated(uint32_t gate, uint32_t up, const GemmParams& p) {  // a pair
  const float low = activate<act>(float_of(gate << 16), float_of(up << 16), p.act_alpha, p.limit);
  const float high =
      activate<act>(float_of(gate & 0xffff0000u), float_of(up & 0xffff0000u), p.act_alpha, p.limit);
  return to_bf16x2(low, high);
}
template <Act act>
__device__ __forceinline__ uint4 activated(const uint4& gate, const uint4& up, const GemmParams& p) {
  return {activated<act>(gate.x, up.x, p), activated<act>(gate.y, up.y, p), activated<act>(gate.z, up.z, p),
          activated<act>(gate.w, up.w, p)};
}
template <class Pairs>
__device__ __forceinline__ Pairs activated(const Pairs& gate, const Pairs& up, const GemmParams& p) {
  if (p.act == Act::silu) return activated<Act::silu>(gate, up, p);
  if (p.act == Act::swiglu_limit) return activated<Act::swiglu_limit>(gate, up, p);
  return activated<Act::swiglu_oai>(gate, up, p);
}

// Slice by slice of tokens, through shared memory: a warp's half tile of a unit, 8 rows, is 16 bytes of a
// token there, its row of place row_of(g) at g.
template <class Kernel>
struct Epilogue {
  using T = typename Kernel::Tile;
  const Kernel& kernel;
  const GemmParams& p;
  const Item& item;
  int group, warp, lane;

  static constexpr int kUnits = T::kUnits, kFactors = 16 * kUnits;  // rows of a warp
  Factors factors[2][kUnits];

  __device__ __forceinline__ Epilogue(const Kernel& kernel, const Item& item)
      : kernel(kernel), p(kernel.p), item(item) {
    const uint32_t thread = thread_again();
    group = static_cast<int>(thread / 128), warp = static_cast<int>(thread / 32 % 4);
    lane = static_cast<int>(thread % 32);
  }

  // To shared memory, a row a lane, while the tile is multiplied: registers are short then.
  __device__ __forceinline__ void bring_factors() const {
    if (lane >= kFactors) return;
    const int half = lane / (8 * kUnits), u = lane / 8 % kUnits;
    const int n = kernel.half_row(item, half) + place_of(group * kUnits + u, warp, lane % 8);
    copy_word(place_of_factor(lane), p.alpha + item.expert * p.alphas + alpha_of(n, p.alphas, p.N), n < p.N);
    if (p.bias) copy_word(place_of_factor(lane) + 1, p.bias + item.expert * p.N + n, n < p.N);
  }
  __device__ __forceinline__ float* place_of_factor(int i) const {
    return kernel.shared.factors[(group * 4 + warp) * kFactors + i];
  }
  __device__ __forceinline__ void take_factors() {
    copies_wait();
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float* from = place_of_factor((half * kUnits + u) * 8 + lane / 4);
        factors[half][u] = {from[0], p.bias ? from[1] : 0.0f};
      }
  }

  template <int N, class Accumulators>
  __device__ __forceinline__ void run(Accumulators& acc, const uint32_t (&worst)[kUnits]) {
    take_factors();
    settle(factors, acc, worst);
    const bool plain = !p.a_scale && !p.bias;
#pragma unroll 1
    for (int first = 0; first < item.count; first += T::kSlice) {
      const float a_scale = plain ? 1.0f : scale_of(first + lane);
      sync_threads(1 + group, 128);  // the slice before is read
#pragma unroll
      for (int slice = 0; slice < N; slice += T::kSlice) {  // accumulators have fixed places
        if (slice != first) continue;
        if (plain)
          stage<true, N>(acc, slice, a_scale);
        else
          stage<false, N>(acc, slice, a_scale);
      }
      sync_threads(1 + group, 128);
      if (!kernel.problem.gated)
        store<false, false>(first);
      else if (p.out_in_k_order)
        store<true, true>(first);
      else
        store<true, false>(first);
    }
  }

  __device__ __forceinline__ uint8_t* staged(int half, int u, int token) const {
    return kernel.shared.out[group][half * kUnits + u] + token * T::kOutBytes;
  }

  __device__ __forceinline__ float scale_of(int token) const {  // of the tile's
    if (!p.a_scale || token >= item.count) return 1.0f;
    return kernel.scale_of(item.first_row + token);
  }

  // A thread of the MMA holds tokens 2 c and 2 c + 1 of eight, for a low and a high row. a_scale: of the
  // slice's token `lane`.
  template <bool plain, int N, class Accumulators>
  __device__ __forceinline__ void stage(const Accumulators& acc, int first, float a_scale) const {
    static_assert(T::kSlice <= 32);
    uint32_t to = shared_address(staged(lane / 8 % 2, 0, lane % 8)) + warp * 16;
    keep(to);
#pragma unroll
    for (int t = 0; t < T::kSlice && first + t < N; t += 8) {
      const float even = plain ? 1.0f : __shfl_sync(~0u, a_scale, t + lane % 4 * 2);
      const float odd = plain ? 1.0f : __shfl_sync(~0u, a_scale, t + lane % 4 * 2 + 1);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32_t pairs[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = (first + t) / 2 + 2 * half;
          pairs[half] = to_bf16x2(scaled<plain>(acc[u](at), factors[half][u], even, p),
                                  scaled<plain>(acc[u](at + 1), factors[half][u], odd, p));
        }
        store_transposed(to + u * T::kPlaneBytes + t * T::kOutBytes, pairs);
      }
    }
  }

  // 16 bytes of a row of the product: piece i of a unit. In the next product's order of K (decode.cuh) it
  // takes two places of every warp, else all of warp i.
  template <bool k_order>
  __device__ __forceinline__ uint4 piece(int half, int u, int token, int i) const {
    const uint8_t* from = staged(half, u, token);
    if constexpr (!k_order) {
      const uint4 words = *reinterpret_cast<const uint4*>(from + i * 16);
      return {__byte_perm(words.x, words.z, 0x5410), __byte_perm(words.x, words.z, 0x7632),
              __byte_perm(words.y, words.w, 0x5410), __byte_perm(words.y, words.w, 0x7632)};
    } else {
      const uint32_t select = i < 2 ? 0x5410 : 0x7632;
      const auto pair = [&](int w) {
        const uint2 words = *reinterpret_cast<const uint2*>(from + w * 16 + i % 2 * 8);
        return __byte_perm(words.x, words.y, select);
      };
      return {pair(0), pair(1), pair(2), pair(3)};
    }
  }

  template <bool gated, bool k_order>
  __device__ __forceinline__ void store(int first) const {
    constexpr int kHalves = gated ? 1 : 2, kPieces = 4 * kUnits * kHalves;  // of a token
    constexpr int kAtOnce = 128 / kPieces, kTimes = (T::kSlice + kAtOnce - 1) / kAtOnce;
    uint32_t thread = warp * 32 + lane;
    keep(thread);  // or what does not depend on the slice waits beside all accumulators
    const int token = thread / kPieces, n = thread % kPieces, half = n / (4 * kUnits);
    const int u = k_order ? n / 4 % kUnits : n % kUnits, i = k_order ? n % 4 : n / kUnits % 4;
    const int64_t width = gated ? p.N / 2 : p.N, column = column_of<k_order>(u, half, i);
    const int left = min(T::kSlice, item.count - first) - token;
    if (left <= 0 || column >= width) return;
    uint4 values[kTimes];
#pragma unroll
    for (int t = 0; t < kTimes; ++t) {  // loads before stores: their latencies overlap
      if (T::kSlice % kAtOnce > 0 && t * kAtOnce >= left) continue;  // it is another plane's
      values[t] = piece<k_order>(half, u, token + t * kAtOnce, i);
      if constexpr (gated) values[t] = activated(values[t], piece<k_order>(1, u, token + t * kAtOnce, i), p);
    }
    bf16* out = p.out + (item.first_row + first + token) * width + column;
#pragma unroll
    for (int t = 0; t < kTimes; ++t)
      if (t * kAtOnce < left) *reinterpret_cast<uint4*>(out + t * kAtOnce * width) = values[t];
  }

  template <bool k_order>
  __device__ __forceinline__ int column_of(int u, int half, int i) const {
    const int unit = group * kUnits + u;
    const int first = kernel.problem.gated ? item.row_tile * T::kHalf : kernel.half_row(item, half);
    return first + unit / 2 * 64 + (k_order ? unit % 2 * 32 + i * 8 : i * 16 + unit % 2 * 8);
  }
};

}  // namespace nvfp4::sm90
