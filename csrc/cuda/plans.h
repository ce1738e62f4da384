// Host side of the CUDA kernels: how a problem is cut into blocks and how much workspace it needs.
// Plain C++, so that it is tested where there is no GPU. The order of summation that a plan fixes
// depends on sizes alone, never on the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define CATAPULT_HOST_DEVICE __host__ __device__
#else
#define CATAPULT_HOST_DEVICE
#endif

namespace catapult::cuda {

CATAPULT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CATAPULT_HOST_DEVICE constexpr int64_t triangle(int64_t rows) { return rows * (rows + 1) / 2; }

// ---- products X Y^T, the inside of every op but the eigensolvers

constexpr int kTile = 64;           // a block computes a kTile x kTile piece ...
constexpr int kThreads = 256;       // ... with 16 x 16 threads
constexpr int kDepth = 16;          // columns of X and Y in shared memory at a time
constexpr int kPromote = 256;       // columns summed in the input's precision before they join a double
constexpr int kMaxTerms = 16;       // layers in one launch (they travel as a kernel argument)
constexpr int kTargetBlocks = 264;  // fewer blocks leave a large GPU idle: the depth is split as well

// The tile (row, column), column <= row, of an index in the order (0,0) (1,0) (1,1) (2,0) ...
CATAPULT_HOST_DEVICE inline void triangle_tile(int64_t index, int64_t& row, int64_t& column) {
  // The square root only has to be close: the loops make it exact.
  row = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) * 0.5);
  while (triangle(row) > index) --row;
  while (triangle(row + 1) <= index) ++row;
  column = index - triangle(row);
}

// The Gram kernel of up to kMaxTerms layers. Product 2 l is A_l A_l^T, product 2 l + 1 is B_l B_l^T.
// When there are too few tiles, every product is cut along its columns into parts; a second launch
// sums the parts of a product first and only then multiplies A with B: the product of partial sums
// is not a partial sum of products.
struct GramPlan {
  int64_t row_tiles, column_tiles;
  int64_t tiles;  // of the lower triangle alone when symmetric
  bool split;
  int64_t first_part[2 * kMaxTerms + 1];  // split: parts of product i are [first_part[i], first_part[i + 1])
  int64_t columns_per_part[2 * kMaxTerms];  // split: a multiple of kPromote

  int64_t parts(int num_terms) const { return first_part[2 * num_terms]; }
};

// a_columns and b_columns hold num_terms <= kMaxTerms entries; 0 columns: the product is absent.
inline GramPlan plan_gram(int64_t rows, int64_t columns, bool symmetric, const int64_t* a_columns,
                          const int64_t* b_columns, int num_terms) {
  GramPlan plan{};
  plan.row_tiles = ceil_div(rows, kTile);
  plan.column_tiles = ceil_div(columns, kTile);
  plan.tiles = symmetric ? triangle(plan.row_tiles) : plan.row_tiles * plan.column_tiles;
  int64_t chunks = 0;  // of kPromote columns, over all products
  for (int i = 0; i < 2 * num_terms; ++i)
    chunks += ceil_div(i % 2 == 0 ? a_columns[i / 2] : b_columns[i / 2], kPromote);
  plan.split = plan.tiles > 0 && plan.tiles < kTargetBlocks / 2 && chunks > 1;
  if (!plan.split) return plan;
  int64_t chunks_per_part = ceil_div(chunks * plan.tiles, kTargetBlocks);
  for (int i = 0; i < 2 * num_terms; ++i) {
    int64_t depth = i % 2 == 0 ? a_columns[i / 2] : b_columns[i / 2];
    plan.columns_per_part[i] = chunks_per_part * kPromote;
    plan.first_part[i + 1] = plan.first_part[i] + ceil_div(depth, plan.columns_per_part[i]);
  }
  return plan;
}

inline int64_t gram_workspace_bytes(const GramPlan& plan, int num_terms, int64_t item_bytes) {
  return plan.split ? plan.tiles * plan.parts(num_terms) * kTile * kTile * item_bytes : 0;
}

// Rows of a weight ([rows, columns] per sample) whose per-sample gradients fit in tile_bytes; at least one.
inline int64_t gradient_tile_rows(int64_t rows, int64_t columns, int64_t samples, int64_t item_bytes,
                                  int64_t tile_bytes) {
  int64_t row_bytes = std::max<int64_t>(1, samples * columns * item_bytes);
  return std::clamp<int64_t>(tile_bytes / row_bytes, 1, std::max<int64_t>(1, rows));
}

// ---- eigenpairs

constexpr int kEighThreads = 512;
constexpr int kReduceSlots = 34;        // doubles of shared memory behind a sum over a block
constexpr int64_t kDirectLimit = 256;   // larger matrices go to block Krylov where k is small
constexpr int64_t kLanczosLimit = 512;  // larger matrices go to block Krylov for their norm
constexpr int kKrylovSteps = 3;         // blocks X, K X, K^2 X of one pass
constexpr int kKrylovPasses = 24;       // launched in full; those after convergence return at once
constexpr int kKrylovGuard = 6;         // columns carried beside the k wanted ones
constexpr int kKrylovRows = 256;        // rows of the basis that one block rotates
constexpr int kInverseIterations = 3;   // of the eigenvectors of the tridiagonal matrix

// One block per matrix: tridiagonalisation, multisection, inverse iteration, all in double.
struct DirectPlan {
  bool matrix_in_shared;
  int64_t shared_bytes;
  int64_t workspace_doubles;  // per matrix
};

// d, e, tau, v, w of length n; vectors and three bands [n, k]; values and coefficients [k].
inline int64_t direct_scratch_doubles(int64_t n, int64_t k) { return 5 * n + 4 * n * k + 2 * k; }

inline DirectPlan plan_direct(int64_t n, int64_t k, int64_t shared_limit) {
  DirectPlan plan{};
  int64_t with_matrix = (kReduceSlots + n * n) * 8;
  plan.matrix_in_shared = with_matrix <= shared_limit;
  plan.shared_bytes = plan.matrix_in_shared ? with_matrix : kReduceSlots * 8;
  plan.workspace_doubles = direct_scratch_doubles(n, k) + (plan.matrix_in_shared ? 0 : n * n);
  return plan;
}

struct KrylovPlan {
  int64_t block;  // b columns, a multiple of 16
  int64_t basis;  // m = kKrylovSteps b columns
  int64_t rotate_blocks;
  // Offsets in doubles into the workspace.
  int64_t vectors, products, next_vectors, next_products;  // [m, n] [m, n] [b, n] [b, n]
  int64_t projected, ritz_values, ritz_vectors, ritz_residuals,
      partials;                        // [m, m] [b] [m, b] [b] [blocks, b]
  int64_t direct, gram;                // workspaces of the inner solvers
  int64_t fallback, fallback_vectors;  // of the direct solver that takes over without convergence; [n + 1, k]
  int64_t flag;                        // one int32
  int64_t total_doubles;
};

inline bool use_direct(int64_t n, int64_t k) {
  int64_t basis = ceil_div(k + kKrylovGuard, 16) * 16 * kKrylovSteps;
  return n <= kDirectLimit || basis > n / 2;
}

inline KrylovPlan plan_krylov(int64_t n, int64_t k, int64_t shared_limit) {
  KrylovPlan plan{};
  plan.block = ceil_div(k + kKrylovGuard, 16) * 16;
  plan.basis = plan.block * kKrylovSteps;
  plan.rotate_blocks = ceil_div(n, kKrylovRows);
  int64_t next = 0;
  auto take = [&next](int64_t doubles) {
    int64_t offset = next;
    next += doubles;
    return offset;
  };
  plan.vectors = take(plan.basis * n);
  plan.products = take(plan.basis * n);
  plan.next_vectors = take(plan.block * n);
  plan.next_products = take(plan.block * n);
  plan.projected = take(plan.basis * plan.basis);
  plan.ritz_values = take(plan.block);
  plan.ritz_vectors = take(plan.basis * plan.block);
  plan.ritz_residuals = take(plan.block);
  plan.partials = take(plan.rotate_blocks * plan.block);
  plan.direct = take(plan_direct(plan.basis, plan.block, shared_limit).workspace_doubles);
  int64_t none = 0;
  GramPlan gram = plan_gram(plan.basis, plan.basis, false, &none, &n, 1);
  plan.gram = take(gram_workspace_bytes(gram, 1, 8) / 8);
  plan.fallback = take(plan_direct(n, k, shared_limit).workspace_doubles);
  plan.fallback_vectors = take((n + 1) * k);
  plan.flag = take(1);
  plan.total_doubles = next;
  return plan;
}

// Lanczos of one matrix: basis [n, n] at most, diagonal and off-diagonal of T.
inline int64_t lanczos_workspace_doubles(int64_t n) { return n * n; }

struct LanczosPlan {
  int threads;
  bool matrix_in_shared;  // a square copy in the input's precision, without asking for more than 48 KB
  int64_t shared_bytes;
};

inline LanczosPlan plan_lanczos(int64_t n, int64_t item_bytes) {
  LanczosPlan plan{};
  plan.threads = n <= 32 ? 32 : n <= 128 ? 128 : 256;
  int64_t vectors = (kReduceSlots + 4 * n) * 8;  // alpha, beta, w, coefficients
  plan.matrix_in_shared = vectors + n * n * item_bytes <= 48 * 1024;
  plan.shared_bytes = vectors + (plan.matrix_in_shared ? n * n * item_bytes : 0);
  return plan;
}

}  // namespace catapult::cuda
