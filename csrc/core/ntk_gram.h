// K (+)= sum_l c_l (A_l A_l^T + beta_l) * (B_l B_l^T), the tangent kernel of layers that use their
// weight once per sample, without the n x p Jacobian.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace catapult {

// One layer. Columns have unit stride; strides count elements and may be 0 (an expanded view).
struct GramTerm {
  const void* a;     // [n, a_cols] layer input; a_cols = 0 leaves beta alone
  int64_t a_stride;  // between samples
  int64_t a_cols;
  const void* b;            // [n, c, b_cols] d output_j / d (layer output)
  int64_t b_stride;         // between samples
  int64_t b_output_stride;  // between outputs
  int64_t b_cols;
  double scale;  // c_l
  double beta;   // beta_l: squared scale of the bias, 0 without one
};

// The symmetric kernel. The lower triangle is computed and mirrored: exact symmetry.
struct NtkGram {
  DType dtype;
  int64_t n, c;
  const GramTerm* terms;
  int64_t num_terms;
  void* kernel;  // [n c, n c]
  int64_t kernel_stride;
  bool accumulate;  // add to what is there (its lower triangle is read) instead of overwriting
  int threads;
};

// K(x, z): terms of x have n samples, terms of z have m; scale and beta are read from x.
struct NtkGramCross {
  DType dtype;
  int64_t n, m, c;
  const GramTerm* x_terms;
  const GramTerm* z_terms;
  int64_t num_terms;
  void* kernel;  // [n c, m c]
  int64_t kernel_stride;
  bool accumulate;
  int threads;
};

// Both return false when a NaN or an infinity was written.
bool ntk_gram(const NtkGram& problem);
bool ntk_gram_cross(const NtkGramCross& problem);

}  // namespace catapult
