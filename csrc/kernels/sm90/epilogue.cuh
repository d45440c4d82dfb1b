// From accumulators to rows of the product: scales, bias and activation in float32, one rounding where the
// composition of operators rounds, then through shared memory into 16-byte pieces.
#pragma once
#include "gemm.cuh"

namespace nvfp4::sm90 {

struct Factors {      // of one weight row
  float alpha, bias;  // alpha of accumulators: times kDecodedUnit
};

// bf16((acc * alpha) * a_scale + bias); `plain`: there is neither a scale nor a bias.
template <bool plain>
__device__ __forceinline__ float finish(float sum, Factors f, float a_scale, const GemmParams& p) {
  float y = sum * f.alpha;
  if (plain) return y;
  if (p.a_scale) y = y * a_scale;
  return p.bias ? y + f.bias : y;
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
__device__ __forceinline__ uint4 activated(const uint4& gate, const uint4& up, const GemmParams& p) {
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
    const int column = p.alphas == 1 ? 0 : p.alphas == 2 ? 2 * n >= p.N : n;
    copy_word(place_of_factor(lane), p.alpha + item.expert * p.alphas + column, n < p.N);
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
        factors[half][u] = {kDecodedUnit * from[0], p.bias ? from[1] : 0.0f};
      }
  }

  template <int N, class Accumulators>
  __device__ __forceinline__ void run(const Accumulators& acc, const uint32_t (&worst)[kUnits]) {
    take_factors();
    poison(worst);
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

  __device__ __forceinline__ void poison(const uint32_t (&worst)[kUnits]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      uint32_t bytes = __vmaxu2(worst[u], __shfl_xor_sync(~0u, worst[u], 1));
      bytes = __vmaxu2(bytes, __shfl_xor_sync(~0u, bytes, 2));
      if ((bytes & 0xffff) == kNaNScale) factors[0][u].alpha = float_of(0x7fc00000u);
      if (bytes >> 16 == kNaNScale) factors[1][u].alpha = float_of(0x7fc00000u);
    }
  }

  __device__ __forceinline__ uint8_t* staged(int half, int u, int token) const {
    return kernel.shared.out[group][half * kUnits + u] + token * T::kOutBytes;
  }

  __device__ __forceinline__ float scale_of(int token) const {  // of the tile's
    if (!p.a_scale || token >= item.count) return 1.0f;
    return p.a_scale[p.a_scale_per_row ? kernel.source_row(item.first_row + token) : 0];
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
          pairs[half] = to_bf16x2(finish<plain>(acc[u](at), factors[half][u], even, p),
                                  finish<plain>(acc[u](at + 1), factors[half][u], odd, p));
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

// Accumulators, and the scales seen, on their way from one CTA to the next.
template <class T>
struct Carried {
  const Problem& problem;
  int group, team;

  __device__ __forceinline__ uint32_t* values(int cta) const {
    return problem.carried + static_cast<int64_t>(cta) * T::kCarried * T::kConsumers + threadIdx.x;
  }
  __device__ __forceinline__ uint64_t* flag(int cta) const {
    return problem.flags + cta * T::kWarpgroups + group;
  }

  template <class Accumulator>
  __device__ __forceinline__ void leave(const Accumulator (&acc)[T::kUnits],
                                        const uint32_t (&worst)[T::kUnits]) const {
    uint32_t* to = values(blockIdx.x);
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < cute::size(acc[u]); ++i, to += T::kConsumers) *to = __float_as_uint(acc[u](i));
      *to = worst[u], to += T::kConsumers;
    }
    __threadfence();
    sync_threads(1 + group, 128);
    if (threadIdx.x % 128 == 0) flag_raise(flag(blockIdx.x), problem.launch);
  }

  // Lowers the flag again: a graph's next replay raises the same one.
  template <class Accumulator>
  __device__ __forceinline__ void take_over(Accumulator (&acc)[T::kUnits],
                                            uint32_t (&worst)[T::kUnits]) const {
    const int before = blockIdx.x - team;
    while (flag_read(flag(before)) != problem.launch) __nanosleep(64);
    const uint32_t* from = values(before);
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) {
#pragma unroll
      for (int i = 0; i < cute::size(acc[u]); ++i, from += T::kConsumers)
        acc[u](i) = __uint_as_float(__ldcg(from));
      worst[u] = __ldcg(from), from += T::kConsumers;
    }
    sync_threads(1 + group, 128);
    if (threadIdx.x % 128 == 0) *flag(before) = 0;
  }
};

template <class T, template <class> class W>
template <int N>
__device__ __forceinline__ void Kernel<T, W>::compute(Pipe& pipe, const Work& work) const {
  const auto& [it, own] = work;
  if constexpr (N < T::kTokens)
    if (it.count > N) return compute<N + T::kStep>(pipe, work);
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (own.end == problem.steps) Epilogue<Kernel>(*this, it).bring_factors();
  const int rows[] = {half_row(it, 0), half_row(it, 1)};
  const Carried<T> carried{problem, group, team()};
  Accumulator<N> acc[T::kUnits];
  uint32_t worst[T::kUnits] = {};
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::clear(acc[u]);
  if (own.begin > 0) carried.take_over(acc, worst);
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::warpgroup_fence_operand(acc[u]);  // or ptxas serialises (C7514)
  multiply_part<N>(pipe, own, Weights::places(problem, rows, group, warp, lane), acc, worst);
  if (own.end < problem.steps) return carried.leave(acc, worst);
  Epilogue<Kernel>(*this, it).template run<N>(acc, worst);
}

template <class T, template <class> class W>
__device__ void Kernel<T, W>::consume() const {
  Pipe pipe;
  for (int n = 0;; n = n == T::kWeightStages ? 0 : n + 1) {
    barrier_wait(&shared.weights_full[pipe.weights], pipe.weights_parity);
    const Work& work = shared.work[n];
    if (work.item.count == 0) return;
    compute<T::kLeast>(pipe, work);
  }
}

// Rows of no expert come back zero.
template <class Kernel>
__device__ void zero_tail(const Kernel& kernel) {
  using T = typename Kernel::Tile;
  const GemmParams& p = kernel.p;
  const int64_t pieces = (kernel.problem.gated ? p.N / 2 : p.N) / 8;
  const int64_t begin = kernel.rows_before(static_cast<int>(p.E)) * pieces, end = p.R * pieces;
  uint4* out = reinterpret_cast<uint4*>(p.out);
  for (int64_t i = begin + blockIdx.x * T::kConsumers + threadIdx.x; i < end; i += gridDim.x * T::kConsumers)
    out[i] = {};
}

// Offsets and weights are read while the kernel before this one still runs: it is prepare.cu's, or a product
// as this one, and neither lets this one come up before what was on the stream before it is done.
template <class T, template <class> class Weights>
__global__ void __launch_bounds__(T::kThreads, 1)
    grouped_kernel(const __grid_constant__ Problem problem, const __grid_constant__ CUtensorMap weights,
                   const __grid_constant__ CUtensorMap tokens) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Kernel = Kernel<T, Weights>;
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const Kernel kernel{shared, problem, problem.p};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kWeightStages; ++i) {
      barrier_init(&shared.weights_full[i], 1);
      barrier_init(&shared.weights_free[i], T::kConsumers / 32 * kArrivals);
    }
    for (int i = 0; i < T::kTokenStages; ++i) {
      barrier_init(&shared.tokens_full[i], 1);
      barrier_init(&shared.tokens_free[i], kernel.team() * T::kConsumers / 32);
    }
    barrier_init_done();
  }
  lead();
  kernel.plan();
  if constexpr (T::kTeam > 1)
    cluster_sync();  // no CTA arrives at a barrier of another before it is there
  else
    __syncthreads();
  if (warp < T::kConsumers / 32) {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    follow();
    if (!problem.p.leave_tail) zero_tail(kernel);
    kernel.consume();
    if constexpr (T::kTeam > 1) cluster_sync();  // no CTA ends before all have arrived at its barriers
    return;
  }
  cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
  if (warp == T::kConsumers / 32 && lane == 0) kernel.load_weights(&weights);
  if (warp == T::kConsumers / 32 + 1 && lane == 0) {
    follow();
    kernel.load_tokens(&tokens);
  }
}

}  // namespace nvfp4::sm90
