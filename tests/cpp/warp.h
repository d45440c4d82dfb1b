// What simt.h lacks for csrc/kernels/sm120/gemm.cuh, in the place of its ptx.cuh: instructions of a warp, and
// copies that arrive when they are waited for and no sooner. A shared address counts from the CTA's memory.
#pragma once
#include <deque>

#include "../blackwell_on_hopper/fragments.h"

namespace simt {

alignas(1024) inline uint8_t shared_memory[99 * 1024];

struct Copy {
  uint32_t to;
  const uint8_t* from;  // null: zeros
};
inline std::vector<std::deque<std::vector<Copy>>> copies;  // of a thread: groups, the last one still open

inline int __ffs(int x) { return __builtin_ffs(x); }

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_memory);
}
inline uint32_t load_word(uint32_t address) {
  uint32_t word;
  return std::memcpy(&word, shared_memory + address, 4), word;
}

inline void copy_async(uint32_t to, const uint8_t* from, bool there) {
  copies[threadIdx.x].back().push_back({to, there ? from : nullptr});
}
inline void commit_copies() { copies[threadIdx.x].emplace_back(); }
template <int kPending>
void wait_for_copies() {
  auto& groups = copies[threadIdx.x];
  for (; groups.size() > kPending + 1; groups.pop_front())
    for (const Copy& copy : groups.front())
      copy.from ? std::memcpy(shared_memory + copy.to, copy.from, 16)
                : std::memset(shared_memory + copy.to, 0, 16);
}

inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  const unsigned lane = threadIdx.x % 32;
  gather(address, [&](const uint32_t* rows) {
    for (int m = 0; m < 4; ++m) to[m] = load_word(rows[8 * m + lane / 4] + lane % 4 * 4);
    return 0;
  });
}
template <int kCount>
void store_transposed(uint32_t address, const uint32_t (&from)[kCount]) {
  const unsigned lane = threadIdx.x % 32;
  gather(address, [&](const uint32_t* columns) {
    for (int m = 0; m < kCount; ++m)
      for (unsigned h = 0; h < 2; ++h) {
        const auto half = static_cast<uint16_t>(from[m] >> 16 * h);
        std::memcpy(shared_memory + columns[8 * m + lane % 4 * 2 + h] + lane / 4 * 2, &half, 2);
      }
    return 0;
  });
}
inline uint32_t to_bf16x2(float low, float high) {
  return nvfp4::to_bf16(low).bits | static_cast<uint32_t>(nvfp4::to_bf16(high).bits) << 16;
}

struct Operands {
  uint32_t a[4], b[2], scales_a, scales_b;
};
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t scales_a,
                     uint32_t scales_b) {
  using namespace emulation;
  const int lane = threadIdx.x % 32;
  const auto value = [](uint32_t codes, int at, uint32_t scales, int block) {
    return nvfp4::e2m1_decode(codes >> 4 * at) * nvfp4::e4m3_decode(scales >> 8 * block & 0x7f);
  };
  gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, scales_a, scales_b}, [&](const Operands* all) {
    for (int v = 0; v < 4; ++v) {
      const int row = lane / 4 + v / 2 * 8, column = lane % 4 * 2 + v % 2;
      for (int k = 0; k < 64; ++k) {
        const Holder at = holder_of_a(row, k), bt = holder_of_b(column, k), as = holder_of_scale_a(row, k),
                     bs = holder_of_scale_b(column, k);
        d[v] += value(all[at.lane].a[at.reg], at.at, all[as.lane].scales_a, as.at) *
                value(all[bt.lane].b[bt.reg], bt.at, all[bs.lane].scales_b, bs.at);
      }
    }
    return 0;
  });
}

}  // namespace simt
