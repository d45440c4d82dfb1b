// The kernels of the table in plan.h. The tests put others behind the same names: the shadow executor, and
// these very kernels compiled for Hopper (tests/blackwell_on_hopper).
#pragma once
#include "../blackwell/groups.h"
#include "plan.h"

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

// Specialised in a file of its own for every tile: a minute of compiler time each.
template <int kTokens, int kSms>
Kernel kernel();

}  // namespace nvfp4::blackwell
