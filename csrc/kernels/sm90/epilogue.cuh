// From accumulators to rows of the product: scales, bias and activation in float32, one rounding where the
// composition of operators rounds, then through shared memory into 16-byte pieces.
#pragma once
#include "gemm.cuh"

namespace nvfp4::sm90 {

struct Factors {  // of one weight row
  float alpha, bias;
};

__device__ __forceinline__ Factors factors_of(const GemmParams& p, int expert, int n) {
  if (n >= p.N) return {0.0f, 0.0f};
  const int column = p.alphas == 1 ? 0 : p.alphas == 2 ? 2 * n >= p.N : n;
  return {p.alpha[expert * p.alphas + column], p.bias ? p.bias[expert * p.N + n] : 0.0f};
}

__device__ __forceinline__ float finish(float sum, Factors f, float a_scale, const GemmParams& p) {
  float y = sum * kDecodedUnit * f.alpha;
  if (p.a_scale) y = y * a_scale;
  return p.bias ? y + f.bias : y;
}

template <Act act>
__device__ uint4 activated(const uint4& gate, const uint4& up, const GemmParams& p) {
  const auto* g = reinterpret_cast<const bf16*>(&gate);
  const auto* u = reinterpret_cast<const bf16*>(&up);
  alignas(16) bf16 out[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    out[i] = to_bf16(activate<act>(to_float(g[i]), to_float(u[i]), p.act_alpha, p.limit));
  return *reinterpret_cast<const uint4*>(out);
}

__device__ __forceinline__ uint4 activated(const uint4& gate, const uint4& up, const GemmParams& p) {
  if (p.act == Act::silu) return activated<Act::silu>(gate, up, p);
  if (p.act == Act::swiglu_limit) return activated<Act::swiglu_limit>(gate, up, p);
  return activated<Act::swiglu_oai>(gate, up, p);
}

template <class Kernel>
struct Epilogue {
  using T = typename Kernel::Tile;
  const Kernel& kernel;
  const GemmParams& p;
  const Item& item;
  int group, warp, lane;

  static constexpr int kUnits = T::kUnits;
  Factors factors[2][kUnits];  // under way while the tile is multiplied

  __device__ Epilogue(const Kernel& kernel, const Item& item, int group, int warp, int lane)
      : kernel(kernel), p(kernel.p), item(item), group(group), warp(warp), lane(lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        factors[half][u] = factors_of(
            p, item.expert, kernel.half_row(item, half) + place_of(group * kUnits + u, warp, lane / 4));
  }

  // Where in its 64 bytes a warp's row of the half tile goes: the next product's order of K (decode.cuh), or
  // the natural one.
  __device__ __forceinline__ int position(int g) const {
    const int place = row_of(g);
    return p.out_in_k_order ? place % 4 * 8 + warp * 2 + place / 4 : warp * 8 + place;
  }
  // Column of piece i (8 values) of unit u, in either half.
  __device__ __forceinline__ int64_t column(int u, int half, int i) const {
    const int unit = group * kUnits + u;
    const int first = kernel.problem.gated ? item.row_tile * T::kHalf : kernel.half_row(item, half);
    return first + unit / 2 * 64 + (p.out_in_k_order ? unit % 2 * 32 + i * 8 : i * 16 + unit % 2 * 8);
  }

  template <int N, class Accumulators>
  __device__ __forceinline__ void run(const Accumulators& acc, const uint32_t (&worst)[kUnits]) const {
    const int g = lane / 4;
    bool poisoned[2][kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      uint32_t bytes = __vmaxu2(worst[u], __shfl_xor_sync(~0u, worst[u], 1));
      bytes = __vmaxu2(bytes, __shfl_xor_sync(~0u, bytes, 2));
      poisoned[0][u] = (bytes & 0xffff) == kNaNScale;
      poisoned[1][u] = bytes >> 16 == kNaNScale;
    }
    auto& staged = kernel.shared.out[group];
#pragma unroll
    for (int first = 0; first < N; first += T::kSlice) {
      if (first >= item.count) break;
      sync_threads(1 + group, 128);  // the slice before is read
#pragma unroll
      for (int t = 0; t < T::kSlice && first + t < N; t += 8)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int token = t + lane % 4 * 2 + b;
          float a_scale = 1.0f;
          if (p.a_scale && first + token < item.count)
            a_scale = p.a_scale[p.a_scale_per_row ? kernel.source_row(item.first_row + first + token) : 0];
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
              const float y = finish(acc[u]((first + t) / 2 + b + 2 * half), factors[half][u], a_scale, p);
              reinterpret_cast<bf16*>(staged[half * kUnits + u][token])[position(g)] =
                  to_bf16(poisoned[half][u] ? float_of(0x7fc00000u) : y);
            }
        }
      sync_threads(1 + group, 128);
      if (kernel.problem.gated)
        store<1>(staged, first);
      else
        store<2>(staged, first);
    }
  }

  template <int halves, class Staged>  // 2: as they are; 1: the activation of low (gate) and high (up)
  __device__ __forceinline__ void store(const Staged& staged, int first) const {
    constexpr int kPieces = 4 * kUnits * halves;
    const int64_t width = halves == 1 ? p.N / 2 : p.N;
    const int tokens = min(T::kSlice, item.count - first);
    for (int i = warp * 32 + lane; i < tokens * kPieces; i += 128) {
      const int token = i / kPieces, plane = i % kPieces / 4, piece = i % 4;
      const int64_t n = column(plane % kUnits, plane / kUnits, piece);
      if (n >= width) continue;
      uint4 values = *reinterpret_cast<const uint4*>(staged[plane][token] + piece * 16);
      if (halves == 1)
        values =
            activated(values, *reinterpret_cast<const uint4*>(staged[kUnits + plane][token] + piece * 16), p);
      *reinterpret_cast<uint4*>(p.out + (item.first_row + first + token) * width + n) = values;
    }
  }
};

// Accumulators, and the scales seen, on their way from one CTA to the next.
template <class T>
struct Carried {
  const Problem& problem;
  int group;

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
    const int before = blockIdx.x - 1;
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
  const Epilogue<Kernel> epilogue(*this, it, group, warp, lane);
  const int rows[] = {half_row(it, 0), half_row(it, 1)};
  const Carried<T> carried{problem, group};
  Accumulator<N> acc[T::kUnits];
  uint32_t worst[T::kUnits] = {};
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::clear(acc[u]);
  if (own.begin > 0) carried.take_over(acc, worst);
#pragma unroll
  for (int u = 0; u < T::kUnits; ++u) cute::warpgroup_fence_operand(acc[u]);  // or ptxas serialises (C7514)
  multiply_part<N>(pipe, own, Weights::places(problem, rows, group, warp, lane), acc, worst);
  if (own.end < problem.steps) return carried.leave(acc, worst);
  epilogue.template run<N>(acc, worst);
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
__global__ void __launch_bounds__(T::kThreads, T::kCtas)
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
      barrier_init(&shared.weights_free[i], T::kConsumers / 32);
    }
    for (int i = 0; i < T::kTokenStages; ++i) {
      barrier_init(&shared.tokens_full[i], 1);
      barrier_init(&shared.tokens_free[i], T::kConsumers / 32);
    }
    barrier_init_done();
  }
  lead();
  kernel.plan();
  __syncthreads();
  if (warp < T::kConsumers / 32) {
    if constexpr (T::kShifts) cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    follow();
    if (!problem.p.leave_tail) zero_tail(kernel);
    kernel.consume();
    return;
  }
  if constexpr (T::kShifts) cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
  if (warp == T::kConsumers / 32 && lane == 0) kernel.load_weights(&weights);
  if (warp == T::kConsumers / 32 + 1 && lane == 0) {
    follow();
    kernel.load_tokens(&tokens);
  }
}

}  // namespace nvfp4::sm90
