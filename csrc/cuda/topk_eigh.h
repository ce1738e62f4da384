// What the two eigensolvers share. Device pointers; everything in double but the matrix and the results.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace catapult::cuda {

// One block per matrix. `skip`: the launch does nothing when *skip is not 0 (a device flag), nullptr never.
template <typename T>
struct DirectProblem {
  int64_t batch, n, k;
  const T* kernel;
  int64_t batch_stride, stride;
  T* values;     // [batch, k]
  T* vectors;    // [batch, n, k]
  T* residuals;  // [batch, k], of the vectors as rounded to T
  double* workspace;
  int* status;
  const int* skip;
};
template <typename T>
void launch_direct(const Stream& stream, const DirectProblem<T>& problem);
// The same for n <= kFusedLimit, version "fused"; the workspace is that of plan_fused.
template <typename T>
void launch_direct_fused(const Stream& stream, const DirectProblem<T>& problem);

// One matrix. values, residuals [k], vectors [n, k].
template <typename T>
struct KrylovProblem {
  int64_t n, k;
  const T* kernel;
  int64_t stride;
  const T* start;  // [n, start_columns] or nullptr
  int64_t start_columns;
  double tol;
  T* values;
  T* vectors;    // nullptr: values only
  T* residuals;  // nullptr: values only
  double* workspace;
  int* status;
};
template <typename T>
void launch_krylov(const Stream& stream, const Context& context, const KrylovProblem<T>& problem);

// spectral_norm of matrices of at most kWarpLimit rows, version "warp".
int64_t norm_warp_workspace_bytes(const Norm& problem, int device);
void launch_norm_warp(const Norm& problem, const Context& context);

}  // namespace catapult::cuda
