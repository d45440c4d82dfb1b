// A grouped product on the CPU: the set-up kernel and sm_120's own kernel, run by simt.h and warp.h.
// tests/test_sm120_sources.py puts the headers before it, once as they are and once for every mistake.
namespace nvfp4::blackwell {

template <int kTokens>
void multiply_groups(const Groups& groups, const Epilogue& epilogue, int64_t E, int ctas) {
  using namespace simt;
  for (unsigned cta = 0; cta < static_cast<unsigned>(ctas); ++cta) {
    std::memset(shared_memory, 0x7f, sizeof shared_memory);
    copies.assign(Tile<kTokens>::kThreads, std::deque<std::vector<Copy>>(1));
    gridDim.x = ctas, blockIdx.x = cta;
    body = [&] { block_scaled_gemm<kTokens>(groups, epilogue, static_cast<int>(E)); };
    run_cta(Tile<kTokens>::kThreads);
  }
}

// As in blackwell.cpp, then the tile's tokens and the number of CTAs.
extern "C" void run(void** at, const int64_t* sizes) {
  const GemmParams p = product_of(at, sizes);
  Groups groups;
  std::vector<uint64_t> arrays(Groups::carve(nullptr, p.E, groups) / sizeof(uint64_t));
  Groups::carve(reinterpret_cast<uint8_t*>(arrays.data()), p.E, groups);
  launch_set_up(p, groups, static_cast<uint8_t*>(at[9]), nullptr);
  const Epilogue epilogue = Epilogue::of(p, groups);
  const int ctas = static_cast<int>(sizes[8]);
  if (sizes[7] == 32) multiply_groups<32>(groups, epilogue, p.E, ctas);
  if (sizes[7] == 64) multiply_groups<64>(groups, epilogue, p.E, ctas);
  if (sizes[7] == 128) multiply_groups<128>(groups, epilogue, p.E, ctas);
}

}  // namespace nvfp4::blackwell
