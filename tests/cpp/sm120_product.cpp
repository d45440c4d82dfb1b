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

// Addresses and sizes as in blackwell.cpp, then the tile's tokens and the number of CTAs.
extern "C" void run(void** at, const int64_t* sizes) {
  GemmParams p{};
  p.a_packed = static_cast<uint8_t*>(at[0]), p.a_sf = static_cast<uint8_t*>(at[1]);
  p.a_scale = static_cast<float*>(at[2]), p.a_scale_per_row = sizes[5] != 1;
  p.b = static_cast<uint8_t*>(at[3]), p.b_sf = static_cast<uint8_t*>(at[4]);
  p.alpha = static_cast<float*>(at[5]), p.bias = static_cast<float*>(at[6]);
  p.offsets = static_cast<int32_t*>(at[7]), p.out = static_cast<bf16*>(at[8]);
  p.R = sizes[0], p.N = sizes[1], p.K = sizes[2], p.E = sizes[3], p.alphas = sizes[4];
  simt::backwards = sizes[6];

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
