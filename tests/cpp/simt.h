// Enough of CUDA to run a kernel of few CTAs on the CPU: a CTA's threads are fibers that change at its
// barriers and shuffles only. A warp runs as far as it can before the next one does, upwards or downwards, so
// that a barrier that is missing shows.
#pragma once
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define CUDA_CHECK(call) (call)

namespace simt {

struct Index {
  unsigned x;
};
struct Barrier {
  int arrived = 0, turn = 0;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  static constexpr int kStack = 1 << 16;
};

inline Index threadIdx, blockIdx, gridDim;
inline bool backwards = false;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> barriers;  // of the CTA, then of its warps
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool moved;  // any thread, since it was cleared

inline void wait(Barrier& barrier, int threads) {
  const int turn = barrier.turn;
  moved = true;
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.turn;
  while (barrier.turn == turn) swapcontext(&fibers[threadIdx.x].context, &scheduler);
  moved = true;
}

inline void run_cta(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  barriers.assign(1 + threads / 32, {});
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, [] { body(), fibers[threadIdx.x].done = moved = true; }, 0);
  }
  bool any = true;
  while (any) {
    any = false;
    for (unsigned warp = 0; warp < threads / 32; ++warp) {
      do {
        moved = false;
        for (unsigned lane = 0; lane < 32; ++lane) {
          const unsigned i = 32 * warp + lane;
          threadIdx.x = backwards ? threads - 1 - i : i;
          if (!fibers[threadIdx.x].done) swapcontext(&scheduler, &fibers[threadIdx.x].context);
        }
        any |= moved;
      } while (moved);
    }
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.done) std::fprintf(stderr, "threads wait for each other\n"), std::abort();
}

template <class Kernel, class... Args>
void launch(unsigned ctas, unsigned threads, Kernel kernel, Args... args) {
  gridDim.x = ctas;
  body = [=] { kernel(args...); };
  for (blockIdx.x = 0; blockIdx.x < ctas; ++blockIdx.x) run_cta(threads);
}

inline void __syncthreads() { wait(barriers[0], static_cast<int>(fibers.size())); }

// The values of all lanes of the warp, given to `use`.
template <class T, class Use>
auto gather(const T& mine, Use use) {
  static std::vector<T> all(1024);
  const unsigned t = threadIdx.x;
  all[t] = mine;
  wait(barriers[1 + t / 32], 32);
  const auto got = use(&all[t / 32 * 32]);
  wait(barriers[1 + t / 32], 32);
  return got;
}

inline int __shfl_up_sync(unsigned, int value, unsigned by) {
  return gather(value,
                [&](const int* all) { return threadIdx.x % 32 < by ? value : all[threadIdx.x % 32 - by]; });
}
inline int __shfl_sync(unsigned, int value, int lane) {
  return gather(value, [&](const int* all) { return all[lane]; });
}
}  // namespace simt

extern "C" {
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
}
