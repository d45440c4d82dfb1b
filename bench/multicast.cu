// What L2 gives the SMs, and what of it multicast saves: bytes a cycle and SM on a Hopper, two constants of
// the model in csrc/kernels/sm100/plan.h. Clusters of C SMs keep rings of shared memory full from 16 MB that
// lie in L2; an SM loads a C-th of every stage for all of its cluster.
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a bench/multicast.cu -o multicast && ./multicast
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../csrc/kernels/cuda/device.h"

constexpr int kStages = 12, kStage = 16384, kSteps = 4000;
constexpr int kAhead = 8;  // stages under way; the others cover the time that a release takes to arrive
constexpr size_t kBytes = 16 << 20;

__device__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}

__device__ void arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

template <int C>
__device__ void load(uint32_t to, const uint8_t* from, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(kStage)
               : "memory");
  if constexpr (C == 1)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(from), "n"(kStage), "r"(barrier)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "n"(kStage / C), "r"(barrier), "h"(static_cast<uint16_t>((1 << C) - 1))
        : "memory");
}

template <int C>
__global__ void stream(const uint8_t* data, int64_t* cycles) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ uint64_t full[kStages], free[kStages];
  const auto at = [](const void* x) { return static_cast<uint32_t>(__cvta_generic_to_shared(x)); };
  const uint32_t rank = blockIdx.x % C, cluster = blockIdx.x / C;
  for (int s = 0; s < kStages; ++s)
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1; mbarrier.init.shared::cta.b64 [%1], %2;" ::"r"(at(&full[s])),
        "r"(at(&free[s])), "n"(C)
        : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
  const int64_t start = clock64();
  for (int i = 0; i < kSteps + kAhead; ++i) {
    if (const int s = i % kStages; i < kSteps) {
      if (i >= kStages) wait(at(&free[s]), (i / kStages - 1) & 1);
      const size_t chunk = (cluster * 61 + i) % (kBytes / kStage);
      const uint32_t mine = rank * (kStage / C);
      load<C>(at(ring) + s * kStage + mine, data + chunk * kStage + mine, at(&full[s]));
    }
    if (const int j = i - kAhead; j >= 0) {
      wait(at(&full[j % kStages]), j / kStages & 1);
      for (int other = 0; other < C; ++other) arrive(at(&free[j % kStages]), other);
    }
  }
  cycles[blockIdx.x] = clock64() - start;
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

template <int C>
void measure(const uint8_t* data, int64_t* cycles) {
  CUDA_CHECK(cudaFuncSetAttribute(stream<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kStage));
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension, shape.val.clusterDim = {C, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = C, config.blockDim = 1, config.dynamicSmemBytes = kStages * kStage;
  config.attrs = &shape, config.numAttrs = 1;
  int clusters = 0;
  CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, stream<C>, &config));
  config.gridDim = clusters * C;
  std::vector<double> rates;
  std::vector<int64_t> took(clusters * C);
  for (int run = 0; run < 12; ++run) {
    CUDA_CHECK(cudaLaunchKernelEx(&config, stream<C>, data, cycles));
    CUDA_CHECK(cudaMemcpy(took.data(), cycles, took.size() * sizeof took[0], cudaMemcpyDeviceToHost));
    if (run >= 2)  // the first ones bring the bytes into L2
      rates.push_back(double(kSteps) * kStage / *std::max_element(took.begin(), took.end()));
  }
  std::sort(rates.begin(), rates.end());
  const double rate = rates[rates.size() / 2];
  std::printf(
      "clusters of %d (%d of them, %d SMs): an SM receives %.1f bytes a cycle, L2 gives %.1f for it\n", C,
      clusters, clusters * C, rate, rate / C);
}

int main() {
  uint8_t* data;
  int64_t* cycles;
  CUDA_CHECK(cudaMalloc(&data, kBytes));
  CUDA_CHECK(cudaMemset(data, 1, kBytes));
  CUDA_CHECK(cudaMalloc(&cycles, 1024 * sizeof *cycles));
  measure<1>(data, cycles), measure<2>(data, cycles), measure<4>(data, cycles), measure<8>(data, cycles);
}
