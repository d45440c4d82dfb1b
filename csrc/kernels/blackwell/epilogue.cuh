// The contract's epilogue as a node of CUTLASS's visitor tree: no source, no shared memory, no state.
#pragma once
#include <cutlass/numeric_conversion.h>

#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "groups.h"

namespace nvfp4::blackwell {

struct EpilogueNode {
  struct SharedStorage {};
  using Arguments = Epilogue;
  using Params = Epilogue;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& args, void*) {
    return args;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE EpilogueNode() {}
  CUTLASS_HOST_DEVICE EpilogueNode(const Params& p, const SharedStorage&) : params(&p) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const cutlass::epilogue::fusion::ProducerLoadArgs<Args...>&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // `at`: coordinates of a thread's values, counted from its first one.
  template <class Coords>
  struct Store : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    const Params& p;
    Coords at;
    int64_t e;
    int n0, row0;  // of the thread's first value
    int last;      // row of the expert
    CUTLASS_DEVICE Store(const Params& p, Coords at, int64_t e, int n0, int row0, int last)
        : p(p), at(at), e(e), n0(n0), row0(row0), last(last) {}

    // Loads come in loops of their own, without a condition (past the end: of the last row): so the compiler
    // sees that a thread's values share a few columns and rows. SASS of the 128x64 tile, sm_100a: 32 loads
    // for a thread's 64 values, 192 with a condition around each.
    template <int kCount>
    CUTLASS_DEVICE auto visit(const cutlass::Array<float, kCount>& acc, int v, int epi_m, int epi_n) {
      const auto here = at(cute::_, cute::_, cute::_, epi_m, epi_n);
      const auto n = [&](int i) { return min(n0 + cute::get<0>(here(v * kCount + i)), p.N - 1); };
      const auto row = [&](int i) { return min(row0 + cute::get<1>(here(v * kCount + i)), last); };
      cutlass::Array<float, kCount> y;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; ++i) y[i] = acc[i] * p.alpha_of(e, n(i)) * p.scale_of(row(i));
      if (p.bias) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i) y[i] += p.bias_of(e, n(i));
      }
      return cutlass::NumericArrayConverter<cutlass::bfloat16_t, float, kCount>{}(y);
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    const auto [N, rows, K, L] = args.problem_shape_mnkl;
    const int64_t e = cute::get<3>(args.tile_coord_mnkl);
    const int end = params->begin[e] + rows;  // the residue counts from the thread's first value to the end
    return Store<decltype(args.tCcD)>(*params, args.tCcD, e, N - cute::get<0>(args.residue_tCcD),
                                      end - cute::get<1>(args.residue_tCcD), end - 1);
  }

  const Params* params;
};

}  // namespace nvfp4::blackwell
