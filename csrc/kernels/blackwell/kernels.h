// What a chip library of Blackwell offers; its chip.cu registers it.
#pragma once
#include <string>

#include "../params.h"

typedef struct CUstream_st* cudaStream_t;

namespace nvfp4::blackwell {

bool takes(const GemmParams&);
int64_t workspace(const GemmParams&);
void grouped_gemm(const GemmParams&, void* workspace, cudaStream_t);
// With one of its tiles, for tests.
void grouped_gemm_with(int tile, const GemmParams&, void* workspace, cudaStream_t);
std::string gemm_plan(int64_t R, int64_t N, int64_t K, int64_t E, bool packed_a);

}  // namespace nvfp4::blackwell
