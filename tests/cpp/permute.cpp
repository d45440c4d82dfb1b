// permute on the CPU from permute.cu's own source, by simt.h. tests/test_routing_sources.py puts it before
// this, once as it is and once for every mistake.
namespace nvfp4::cuda {

// Sizes: T, k, E, the first expert, whether threads run backwards.
extern "C" int run(const int32_t* ids, const int* sizes, int32_t* rows, int32_t* offsets, int32_t* slots) {
  backwards = sizes[4];
  const PermuteParams p{ids, sizes[0], sizes[1], sizes[2], sizes[3], rows, offsets, slots};
  std::vector<char> workspace(permute_workspace(p), '\xaa');
  permute(p, workspace.data(), nullptr);
  return 0;
}

}  // namespace nvfp4::cuda
