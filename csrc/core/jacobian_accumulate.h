// K += G G^T and grad += G^T w in one sweep over a tile of per-sample gradients G.
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
};

// Returns false when a NaN or an infinity was written to the kernel.
bool jacobian_accumulate(const JacobianAccumulate& problem);

}  // namespace catapult
