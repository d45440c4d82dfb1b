// What runs on the arrays: a kernel of CUTLASS's, or the tests' shadow executor.
#pragma once
#include "groups.h"

typedef struct CUstream_st* cudaStream_t;

namespace nvfp4::blackwell {

struct Launch {
  Groups groups;
  Epilogue epilogue;
  int64_t E;
  int sms;          // of the device
  void* workspace;  // workspace() bytes
};

struct Kernel {
  int64_t (*workspace)(const Launch&);
  void (*run)(const Launch&, cudaStream_t);
};

}  // namespace nvfp4::blackwell
