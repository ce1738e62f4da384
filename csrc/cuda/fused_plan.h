// Host side of the fast eigensolvers, beside plans.h: plain C++, tested without a GPU. Everything here
// follows from sizes and the shared memory of the device alone.
#pragma once

#include "cuda/plans.h"

namespace catapult::cuda {

constexpr int kFusedThreads = 256;     // 16 x 16 of them share a panel of the matrix ...
constexpr int kPanelSide = 128;        // ... of this many rows and columns
constexpr int64_t kFusedLimit = 256;   // rows of the largest matrix: two panels
constexpr int kHouseholderArrays = 8;  // of the padded length in shared memory
constexpr int kFusedIterations = 2;    // of the eigenvectors of the tridiagonal matrix
constexpr int64_t kWarpLimit = 128;    // rows of the largest matrix of spectral_norm "warp"
constexpr int kBracketSteps = 16;      // Lanczos steps before the direct method takes over

// The direct solver: one block, k = 0 for the largest value alone.
struct FusedPlan {
  int panels;
  int64_t ld;  // of the matrix and of the vectors: odd
  bool matrix_in_shared, vectors_in_shared;
  int64_t vectors_doubles;  // values [k], products [k], vectors [k, ld], bands [n, 5, k]
  int64_t shared_bytes;
  int64_t workspace_doubles;  // per matrix
};

inline FusedPlan plan_fused(int64_t n, int64_t k, int64_t shared_limit) {
  FusedPlan plan{};
  plan.panels = n <= kPanelSide ? 1 : 2;
  plan.ld = n | 1;
  const int64_t fixed = kHouseholderArrays * plan.panels * kPanelSide + kReduceSlots + 1;
  const int64_t matrix = n * plan.ld;
  plan.vectors_doubles = 2 * k + k * plan.ld + 5 * n * k;
  plan.matrix_in_shared = 8 * (fixed + matrix) <= shared_limit;
  const int64_t with_matrix = fixed + (plan.matrix_in_shared ? matrix : 0);
  plan.vectors_in_shared = 8 * (with_matrix + plan.vectors_doubles) <= shared_limit;
  plan.shared_bytes = 8 * (with_matrix + (plan.vectors_in_shared ? plan.vectors_doubles : 0));
  plan.workspace_doubles =
      (plan.matrix_in_shared ? 0 : matrix) + (plan.vectors_in_shared ? 0 : plan.vectors_doubles);
  return plan;
}

// Block Krylov: kKrylovCluster blocks share the rows of the basis.
constexpr int kKrylovCluster = 8;
constexpr int64_t kLargestKrylovBlock = 32;  // columns: larger blocks go the simple way

constexpr int64_t krylov_block(int64_t k) { return ceil_div(k + kKrylovGuard, 16) * 16; }
constexpr bool use_fused_krylov(int64_t k) { return krylov_block(k) <= kLargestKrylovBlock; }

struct KrylovFusedPlan {
  int64_t block, basis;
  int64_t row_tiles;  // of 16 rows that a block of the products K X has
  int64_t cluster_shared_bytes;
  // Offsets in doubles into the workspace.
  int64_t vectors, products;           // [basis, n] each
  int64_t ritz_values;                 // [block]
  int64_t bands;                       // [basis, 5, block] where they do not fit beside the rest
  int64_t fallback, fallback_vectors;  // of the direct solver that takes over without convergence; [n + 1, k]
  int64_t flag;                        // one int32
  int64_t total_doubles;
};

inline KrylovFusedPlan plan_krylov_fused(int64_t n, int64_t k, int64_t shared_limit) {
  KrylovFusedPlan plan{};
  const int64_t block = plan.block = krylov_block(k), basis = plan.basis = block * kKrylovSteps;
  plan.row_tiles = ceil_div(n, 16) <= 132 ? 1 : 2;  // one for each multiprocessor, or half the reads of X
  const int64_t inner = kHouseholderArrays * kPanelSide + kReduceSlots + 1 + basis * (basis | 1) + 2 * block +
                        block * (basis | 1) + (block == 16 ? 5 * basis * block : 0);
  const int64_t partial = kFusedThreads / 32 * 48 * 16;
  plan.cluster_shared_bytes = 8 * (10 * block * block + 2 * block + std::max(inner, partial));
  int64_t next = 0;
  auto take = [&next](int64_t doubles) {
    int64_t offset = next;
    next += doubles;
    return offset;
  };
  plan.vectors = take(basis * n);
  plan.products = take(basis * n);
  plan.ritz_values = take(block);
  plan.bands = take(block == 16 ? 0 : 5 * basis * block);
  plan.fallback = take(plan_direct(n, k, shared_limit).workspace_doubles);
  plan.fallback_vectors = take((n + 1) * k);
  plan.flag = take(1);
  plan.total_doubles = next;
  return plan;
}

// Lanczos with a proven bracket: a warp for a small matrix, four warps for larger ones, K in shared memory.
struct WarpPlan {
  int threads;
  int64_t ld;  // odd
  int64_t shared_bytes;
};

inline WarpPlan plan_warp(int64_t n, int64_t item_bytes) {
  WarpPlan plan{};
  plan.threads = n <= 32 ? 32 : 128;
  plan.ld = n | 1;
  const int64_t doubles = kReduceSlots + 3 * (kBracketSteps + 1);  // alpha, squares of beta, products
  plan.shared_bytes = 8 * doubles + item_bytes * plan.ld * (n + kBracketSteps + 1);  // K and the basis
  return plan;
}

}  // namespace catapult::cuda
