// Average gradient outer product: agop += scale G^T G, and <G^T G, H^T H>_F = ||G H^T||_F^2.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

struct AgopReduce {
  DType dtype;
  int64_t rows, d;
  const void* g;  // [rows, d] input gradients
  int64_t g_stride;
  double scale;
  void* agop;  // [d, d], symmetric, accumulated into
  int64_t agop_stride;
  int threads;
};

struct AgopInner {
  DType dtype;
  int64_t g_rows, h_rows, d;
  const void* g;  // [g_rows, d]
  int64_t g_stride;
  const void* h;  // [h_rows, d]
  int64_t h_stride;
  int threads;
};

bool agop_reduce(const AgopReduce& problem);  // false: a NaN or an infinity was written
double agop_inner(const AgopInner& problem);  // sum of squares of G H^T, summed in double

}  // namespace catapult
