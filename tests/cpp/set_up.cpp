// A grouped product on the CPU: csrc/kernels/blackwell's own set-up kernel, run by simt.h, then scalar loops
// over what it wrote (shadow.h). tests/test_blackwell_set_up.py puts the three headers before it, once as
// they are and once for every mistake, each time in a namespace of its own.
namespace nvfp4::blackwell {

// Addresses: a, a_sf, a_scale, b, b_sf, alpha, bias, offsets, out, room for the scales; sizes: R, N, K, E,
// alphas, scales of a, backwards.
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
  for (int64_t e = 0; e < p.E; ++e)
    for (int n = 0; n < cute::get<0>(groups.shape[e]); ++n)
      for (int row = 0; row < cute::get<1>(groups.shape[e]); ++row)
        shadow_value(groups, Epilogue::of(p, groups), e, n, row);
}

}  // namespace nvfp4::blackwell
