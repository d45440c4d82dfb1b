// A grouped product on the CPU: csrc/kernels/blackwell's own set-up kernel, run by simt.h, then scalar loops
// over what it wrote (shadow.h). tests/test_blackwell_sources.py puts the headers before it, once as they are
// and once for every mistake, each time in a namespace of its own.
namespace nvfp4::blackwell {

// The tile of expert e at m, n as CUTLASS's epilogue finishes it, 128 threads x 64 values: 2 rows of weights
// x 16 tokens in each of two parts, 8 values a visit. Coordinates count from a thread's first value, residues
// from there to the end.
static void finish(const Groups& g, const Epilogue& epilogue, int e, int m0, int n0) {
  using namespace cute;
  EpilogueNode node(epilogue, {});
  const int M = get<0>(g.shape[e]), N = get<1>(g.shape[e]);
  const auto mine =
      make_layout(make_shape(make_shape(_2{}, _16{}), _1{}, _1{}, _1{}, _2{}),
                  make_stride(make_stride(_8{} * E<0>{}, E<1>{}), _0{}, _0{}, _0{}, _32{} * E<1>{}));
  int none = 0;
  for (int t = 0; t < 128; ++t) {
    const int m = m0 + t / 16 * 16 + t % 8, n = n0 + t / 8 % 2 * 16;
    const auto at = make_coord_tensor(mine);
    const auto residue = make_coord(M - m, N - n);
    const cutlass::epilogue::fusion::detail::ConsumerStoreArgs args{make_shape(M, N, get<2>(g.shape[e]), 1),
                                                                    0,
                                                                    make_coord(m0 / 128, n0 / 64, 0, e),
                                                                    0,
                                                                    0,
                                                                    0,
                                                                    at,
                                                                    residue,
                                                                    at,
                                                                    residue,
                                                                    none,
                                                                    t};
    auto store = node.get_consumer_store_callbacks<false>(args);
    for (int part = 0; part < 2; ++part)
      for (int v = 0; v < 4; ++v) {
        cutlass::Array<float, 8> acc;
        const auto place = [&](int i) { return at(v * 8 + i, 0, 0, 0, part); };
        const auto inside = [&](int i) {
          return get<0>(place(i)) < get<0>(residue) && get<1>(place(i)) < get<1>(residue);
        };
        for (int i = 0; i < 8; ++i)
          acc[i] = inside(i) ? shadow_sum(g, e, m + get<0>(place(i)), n + get<1>(place(i))) : 0;
        const auto y = store.visit(acc, v, 0, part);
        for (int i = 0; i < 8; ++i)
          if (inside(i))
            g.out[e][m + get<0>(place(i)) + (n + get<1>(place(i))) * get<1>(g.out_stride[e])].bits =
                cutlass::bfloat16_t(y[i]).raw();
      }
  }
}

// As product_of takes them; then, an address, room for the scales.
extern "C" void run(void** at, const int64_t* sizes) {
  const GemmParams p = product_of(at, sizes);
  Groups groups;
  std::vector<uint64_t> arrays(Groups::carve(nullptr, p.E, groups) / sizeof(uint64_t));
  Groups::carve(reinterpret_cast<uint8_t*>(arrays.data()), p.E, groups);
  launch_set_up(p, groups, static_cast<uint8_t*>(at[9]), nullptr);
  for (int e = 0; e < p.E; ++e)
    for (int m = 0; m < cute::get<0>(groups.shape[e]); m += 128)
      for (int n = 0; n < cute::get<1>(groups.shape[e]); n += 64)
        finish(groups, Epilogue::of(p, groups), e, m, n);
}

}  // namespace nvfp4::blackwell
