// What the two eigensolvers share. Device pointers; everything in double but the matrix and the results.
#pragma once

#include <cstdint>
#include <functional>

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

// The same in version "fused", for k where use_fused_krylov; needs clusters (Hopper). The workspace is that
// of plan_krylov_fused.
template <typename T>
void launch_krylov_fused(const Stream& stream, const KrylovProblem<T>& problem);

// State of block Krylov on the device: launches behind kRunning's end return at once.
enum KrylovFlag : int { kRunning = 0, kConverged = 1, kBroken = 2 };

// What both versions end with. Eigenpairs are rounded, `multiply` enqueues products[j] = K vectors[j] for the
// residuals of what is returned; without convergence the direct solver takes over.
struct KrylovResult {
  double *vectors, *products;  // [at least k, n]
  double* ritz_values;
  double *fallback, *fallback_vectors;  // workspaces of the direct solver, of plan_direct and [n + 1, k]
  int* flag;
};
template <typename T>
void finish_krylov(const Stream& stream, const KrylovProblem<T>& problem, const KrylovResult& result,
                   const std::function<void()>& multiply);

// spectral_norm of matrices of at most kWarpLimit rows, version "warp".
int64_t norm_warp_workspace_bytes(const Norm& problem, int device);
void launch_norm_warp(const Norm& problem, const Context& context);

}  // namespace catapult::cuda
