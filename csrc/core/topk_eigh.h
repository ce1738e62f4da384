// Largest (algebraic) eigenpairs of symmetric matrices, batched.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

enum class EighMethod : int {
  kAuto = 0,    // direct for small n, block Krylov above
  kDirect = 1,  // tridiagonalisation, multisection, twisted factorisation; always converges
  kKrylov = 2,  // block Krylov with restarts, warm start from `start`
};

struct TopkEigh {
  DType dtype;
  int64_t batch, n, k;
  const void* kernel;  // [batch, n, n], symmetric; only the lower triangle need be right
  int64_t kernel_batch_stride, kernel_stride;
  const void* start;  // [batch, n, start_cols] contiguous, or nullptr
  int64_t start_cols;
  double tol;  // stop when ||K v - lambda v|| <= tol lambda_1 for all k pairs
  EighMethod method;
  void* values;     // [batch, k] descending
  void* vectors;    // [batch, n, k] orthonormal columns, largest |component| positive
  void* residuals;  // [batch, k] ||K v - lambda v||
  int8_t* status;   // [batch] 0 converged, 1 not converged (values are the best found), 2 non-finite
  int threads;
};

void topk_eigh(const TopkEigh& problem);

struct SpectralNorm {
  DType dtype;
  int64_t batch, n;
  const void* kernel;  // [batch, n, n] symmetric positive semi-definite
  int64_t kernel_batch_stride, kernel_stride;
  double tol;  // relative error bound on lambda_1
  void* values;  // [batch]
  int8_t* status;  // [batch] as above
  int threads;
};

// Few-step Lanczos that stops on its residual bound, direct tridiagonalisation where it does not.
void spectral_norm(const SpectralNorm& problem);

}  // namespace catapult
