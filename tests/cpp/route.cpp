// route on the CPU from route.cu's own source, by simt.h. tests/test_routing_sources.py puts it before this,
// once as it is and once for every mistake.
namespace nvfp4::cuda {

// Sizes: the dtype, T, E, top_k, n_group, topk_group, the score, whether to renormalize, multiprocessors,
// whether threads run backwards.
extern "C" int run(const void* logits, const float* bias, const int* sizes, float* weights, int32_t* ids) {
  multiprocessors = sizes[8], backwards = sizes[9];
  route({logits, Real(sizes[0]), bias, sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], Score(sizes[6]),
         sizes[7] != 0, 2.5f, weights, ids},
        nullptr);
  return 0;
}

}  // namespace nvfp4::cuda
