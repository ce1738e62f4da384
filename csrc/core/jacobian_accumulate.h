// K += s^2 G G^T and grad += s G^T w in one sweep over a tile of per-sample gradients s G.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

struct JacobianAccumulate {
  DType dtype;
  int64_t rows, cols;  // rows = n c
  const void* tile;    // [rows, cols] per-sample gradients of `cols` parameters
  int64_t tile_stride;
  void* kernel;  // [rows, rows], symmetric, accumulated into
  int64_t kernel_stride;
  const void* weight;  // [rows] or nullptr: grad is then left alone
  void* grad;          // [cols], accumulated into
  int threads;
  double scale = 1.0;  // s
};

// Returns false when a NaN or an infinity was written to the kernel or to grad.
bool jacobian_accumulate(const JacobianAccumulate& problem);

}  // namespace catapult
