// Enough of CUDA to run a kernel of few CTAs on the CPU: a CTA's threads are fibers that change at its
// barriers and shuffles only. A warp runs as far as it can before the next one does, upwards or downwards, so
// that a barrier that is missing shows.
#pragma once
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
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

inline Index threadIdx, blockIdx, gridDim, blockDim;
inline bool backwards = false;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> barriers;  // of the CTA, then of its warps
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool moved;     // any thread, since it was cleared
inline void* dynamic;  // shared memory whose size a launch says

inline void wait(Barrier& barrier, int threads) {
  const int turn = barrier.turn;
  moved = true;
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.turn;
  while (barrier.turn == turn) swapcontext(&fibers[threadIdx.x].context, &scheduler);
  moved = true;
}

inline void run_cta(unsigned threads) {
  blockDim.x = threads;
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
inline void __syncwarp() { wait(barriers[1 + threadIdx.x / 32], 32); }

// The values of all lanes of the warp, given to `use`.
template <class T, class Use>
auto gather(const T& mine, Use use) {
  static std::vector<T> all(1024);
  const unsigned t = threadIdx.x;
  all[t] = mine;
  __syncwarp();
  const auto got = use(&all[t / 32 * 32]);
  __syncwarp();
  return got;
}

inline unsigned lane() { return threadIdx.x % 32; }
inline int __shfl_up_sync(unsigned, int value, unsigned by) {
  return gather(value, [&](const int* all) { return lane() < by ? value : all[lane() - by]; });
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return gather(value, [&](const T* all) { return all[from]; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return gather(value, [&](const T* all) { return all[lane() ^ by]; });
}
template <class T>
T __reduce_max_sync(unsigned, T value) {
  return gather(value, [](const T* all) { return *std::max_element(all, all + 32); });
}
template <class T>
T __reduce_min_sync(unsigned, T value) {
  return gather(value, [](const T* all) { return *std::min_element(all, all + 32); });
}
template <class T>
T __reduce_add_sync(unsigned, T value) {
  return gather(value, [](const T* all) { return std::accumulate(all, all + 32, T{}); });
}
inline unsigned __match_any_sync(unsigned, int value) {
  return gather(value, [&](const int* all) {
    unsigned equals = 0;
    for (int i = 0; i < 32; ++i) equals |= unsigned{all[i] == value} << i;
    return equals;
  });
}
inline unsigned __ballot_sync(unsigned mask, bool yes) {
  const unsigned alike = __match_any_sync(mask, yes);
  return yes ? alike : ~alike;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* to, int by) { return *to += by, *to - by; }
inline int atomicOr(int* to, int bits) { return std::exchange(*to, *to | bits); }
}  // namespace simt

extern "C" {
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
}
