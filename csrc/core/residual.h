// r = f - y and the sum of its squares: the loss of a step, in one pass.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

struct Residual {
  DType dtype;
  int64_t count;
  const void* prediction;  // f [count]
  const void* target;      // y [count]
  void* residual;          // r [count]
};

double residual(const Residual& problem);  // sum of r^2, in double

}  // namespace catapult
