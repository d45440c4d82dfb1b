// The kernels of the table in plan.h. The tests put others behind the same names: the shadow executor, and
// these very kernels compiled for Hopper (tests/blackwell_on_hopper).
#pragma once
#include "../blackwell/launch.h"
#include "plan.h"

namespace nvfp4::blackwell {

// Specialised in a file of its own for every tile: a minute of compiler time each.
template <int kTokens, int kSms, int kCluster = kSms>
Kernel kernel();

}  // namespace nvfp4::blackwell
