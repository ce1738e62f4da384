// W += s L^T diag(w) R: the gradient step of a layer from its features and sensitivities, in place.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

struct RankUpdate {
  DType dtype;
  int64_t rows;           // samples
  int64_t height, width;  // of W
  const void* left;       // [rows, height], or nullptr for ones
  int64_t left_stride;
  const void* right;  // [rows, width]
  int64_t right_stride;
  const void* weight;  // [rows], or nullptr for ones
  int64_t weight_stride;
  double scale;  // s
  void* matrix;  // W [height, width]
  int64_t matrix_stride;
  int64_t left_step = 1;  // between columns of L
};

// All updates of one step, in order. None may read what another one writes.
void rank_updates(const RankUpdate* updates, int64_t count, int threads);

}  // namespace catapult
