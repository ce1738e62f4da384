// Largest (algebraic) eigenpairs of symmetric matrices, batched.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

enum class EighMethod : int {
  // By n and k: direct for small n, block Krylov above (with the direct method where it does not converge);
  // left to the caller (status 1) where LAPACK's full decomposition is faster: many pairs of a large matrix.
  kAuto = 0,
  // Householder reduction, Sturm multisection and twisted factorisation, or QL: needs no spectral gap.
  kDirect = 1,
  // Block Krylov with restarts and a warm start from `start`.
  kKrylov = 2,
};

struct TopkEigh {
  DType dtype;
  int64_t batch, n, k;
  const void* kernel;  // [batch, n, n], symmetric; only the lower triangle need be right
  int64_t kernel_batch_stride, kernel_stride;
  const void* start;  // [batch, n, start_cols] contiguous, or nullptr; need not be orthonormal
  int64_t start_cols;
  double tol;  // stop when ||K v - lambda v|| <= tol lambda_1 for all k pairs
  EighMethod method;
  void* values;     // [batch, k] descending
  void* vectors;    // [batch, n, k] orthonormal columns, largest |component| positive
  void* residuals;  // [batch, k] ||K v - lambda v||, measured
  int8_t* status;   // [batch] 0 converged; 1 not, or left to the caller; 2 NaN, infinity or overflow
  int threads;
};

void topk_eigh(const TopkEigh& problem);

struct SpectralNorm {
  DType dtype;
  int64_t batch, n;
  const void* kernel;  // [batch, n, n] symmetric positive semi-definite
  int64_t kernel_batch_stride, kernel_stride;
  double tol;      // relative error bound on lambda_1
  void* values;    // [batch]
  int8_t* status;  // [batch] as above
  int threads;
};

// A few Lanczos steps where their bracket of lambda_1 closes (csrc/cpu/spectral_norm_kernel.inc has the
// proof), the direct method where it does not; block Krylov for large n. Batches of small matrices are taken
// in groups, one matrix in each lane of a vector: the bits of a norm depend on the batch, not on the threads.
void spectral_norm(const SpectralNorm& problem);

}  // namespace catapult
