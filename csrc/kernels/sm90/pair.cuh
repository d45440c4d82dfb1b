// A layer's two products in one launch, in tiles of eight tokens: the second one's weights are on their way
// while the first one is still finished elsewhere, and a tile of its tokens is computed on as soon as all
// rows of weights have given their part of them.
//
// CTAs take shares of work in turn, first all of the first product's, then the second one's. A share waits
// only for shares taken before it, and whoever took those is running or done: the launch ends however few of
// its CTAs run at a time, and whatever else is on the card.
#pragma once
#include "kernel.cuh"

namespace nvfp4::sm90 {

struct Shares {  // as a thread that brings or announces sees them
  Mailbox& box;
  uint32_t* taken;  // by all CTAs
  int each;         // of a product
  uint32_t parity = 0;

  __device__ __forceinline__ int take() const { return static_cast<int>(atomicAdd(taken, 1)); }
  __device__ __forceinline__ bool has(int share) const { return share < 2 * each; }

  // For the thread that takes them: what follows `last`, of which the others hear. A CTA is done after one
  // share of the second product, and goes on until it has had one: there are as many of these as CTAs.
  __device__ __forceinline__ int next(int last) {
    const int share = last < each ? take() : 2 * each;
    barrier_sleep(&box.free, parity);
    parity ^= 1;
    box.share = share;
    barrier_arrive(&box.full);
    return share;
  }
  // For the others: the first, and the next.
  __device__ __forceinline__ int heard() const {
    const int share = box.share;
    barrier_arrive(&box.free);
    return share;
  }
  __device__ __forceinline__ int next_heard() {
    barrier_sleep(&box.full, parity);
    parity ^= 1;
    return heard();
  }
};

// Choices and weights are read while the kernels before this one still run: permute's, which lets nobody come
// up before all ahead of it is done, and prepare.cu's. `taken` is 0.
template <class T, template <class> class Weights>
__global__ void __launch_bounds__(T::kThreads, 1)
    pair_kernel(const __grid_constant__ Pair pair, uint32_t* taken) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Kernel = Kernel<T, Weights, true>;
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(raw);
  const auto kernel_of = [&](int product) { return Kernel(shared, pair.product[product].problem); };
  const int each = pair.product[0].problem.by_teams.divisor, warp = threadIdx.x / 32;
  Shares shares{shared.mailbox, taken, each};
  const bool takes = threadIdx.x == T::kThreads - 64;
  const int first = takes ? shares.take() : 0;  // on its way meanwhile
  touch(pair);
  come_up(kernel_of(0));
  if (takes) shared.mailbox.share = first;
  are_up<T>();
  if (warp < T::kConsumers / 32) {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    follow();
    typename Kernel::Pipe pipe;
    for (int n = 0; const Work* work = kernel_of(0).next_work(pipe, n); ++n)
      Narrow<Kernel>(kernel_of(work->part.product), pipe).compute(*work, n);
    return;
  }
  cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
  Ring ring;
  if (warp == T::kConsumers / 32 && elected()) {
    for (int share = shared.mailbox.share; shares.has(share); share = shares.next(share)) {
      const int product = share >= each;
      const Kernel kernel = kernel_of(product);
      kernel.load_weights(&pair.product[product].weights, kernel.share(share - product * each), ring);
    }
    kernel_of(0).end_weights(ring);
  }
  if (warp == T::kConsumers / 32 + 1 && elected()) {
    follow();
    for (int share = shares.heard(); shares.has(share); share = shares.next_heard()) {
      const int product = share >= each;
      const Kernel kernel = kernel_of(product);
      kernel.load_tokens(&pair.product[product].tokens, kernel.share(share - product * each), ring);
    }
    kernel_of(0).end_tokens(ring);
  }
  if (warp == T::kConsumers / 32 + 2) {
    const bool hears = threadIdx.x % 32 == 0;
    for (int share = hears ? shares.heard() : 0;; share = hears ? shares.next_heard() : 0) {
      share = __shfl_sync(~0u, share, 0);
      if (!shares.has(share)) return;
      const int product = share >= each;
      const Kernel kernel = kernel_of(product);
      announce(kernel, kernel.share(share - product * each), ring.parts);
    }
  }
}

}  // namespace nvfp4::sm90
