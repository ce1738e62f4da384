// Many steps of stochastic gradient descent on a chain of Linear layers, in one call: forward, sensitivities,
// tangent kernel of the batch, its largest eigenvalue, update. One thread: at the batch sizes that this is
// for, a step is shorter than it takes to wake a second one.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

// z = weight_scale A W^T + bias_scale b; the next layer's input is z where z > 0, slope z elsewhere.
struct ChainLayer {
  int64_t in, out;
  void* weight;  // W [out, in]
  int64_t weight_stride;
  double weight_scale;
  void* bias;  // b [out], or nullptr
  double bias_scale;
  bool trains_weight, trains_bias;
  double slope;  // 0: ReLU, 1: linear; not read for the last layer
};

// L = mean of (f - y)^2 over a batch; W -= rate dL/dW.
struct ChainSgd {
  DType dtype;
  const ChainLayer* layers;  // the last one has one output
  int64_t num_layers;
  const void* x;  // [n, in of the first layer]
  int64_t x_stride;
  const void* y;  // [n]
  int64_t y_stride;
  const int64_t* batch_index;  // samples of all batches, one batch after the other
  const int64_t* batch_sizes;  // [steps], each >= 1
  const double* rates;         // [steps]
  const uint8_t* observed;     // [steps]: whether the kernel of this batch is asked for
  int64_t steps;
  double loss_limit;  // a step whose loss exceeds it is not made
  double tol;         // relative error bound of lambda_1
  void* losses;       // [steps] before each update
  void* lambda_1;  // [steps] largest eigenvalue of K of the batch before each update, NaN where not observed
};

// Returns how many steps were made. The first one that is not has a loss above the limit, which `losses` then
// holds, or a loss or a kernel that is not finite, for which it holds NaN; behind it both results hold NaN.
int64_t chain_sgd(const ChainSgd& problem);

}  // namespace catapult
