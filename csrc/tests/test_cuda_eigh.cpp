// Host side of the fast eigensolvers on CUDA, and the scalar algorithms that their threads run.
#include "cuda/fused_plan.h"
#include "cuda/tridiagonal.h"
#include "test.h"

namespace catapult::tests {

using namespace catapult::cuda;

namespace {

// T with 2 on the diagonal and -1 beside it, over its spectral bound 4.
struct Laplacian {
  std::vector<double> d, e, squares;
  explicit Laplacian(int64_t n) : d(n, 0.5), e(n, -0.25), squares(n, 0.0) {
    for (int64_t i = 1; i < n; ++i) squares[i] = squared_coupling(e[i - 1]);
  }
  double eigenvalue(int64_t rank) const {  // 0 is the largest
    const double n = static_cast<double>(d.size());
    return 0.5 - 0.5 * std::cos(std::acos(-1.0) * (n - static_cast<double>(rank)) / (n + 1.0));
  }
};

}  // namespace

CATAPULT_TEST(cuda_scaled_count_is_exact_between_eigenvalues) {
  for (int n : {1, 2, 7, 8, 9, 33, 256}) {
    const Laplacian t(n);
    for (int rank = 0; rank + 1 < n; ++rank) {
      const double between = 0.5 * (t.eigenvalue(rank) + t.eigenvalue(rank + 1));
      const int count = count_above_scaled(t.d.data(), t.squares.data(), n, between);
      EXPECT(count == rank + 1, "n " << n << " rank " << rank << ": got " << count);
    }
    EXPECT(count_above_scaled(t.d.data(), t.squares.data(), n, -1.0) == n, "all are above -1");
    EXPECT(count_above_scaled(t.d.data(), t.squares.data(), n, 1.1) == 0, "none is above 1.1");
  }
}

CATAPULT_TEST(cuda_scaled_count_survives_ties_and_vanishing_couplings) {
  // Determinants shrink by 1e-16 a row at a shift beside an eigenvalue of this multiplicity.
  for (int n : {20, 200, 256}) {
    std::vector<double> d(n, 0.7), squares(n, squared_coupling(0.0));
    squares[0] = 0.0;
    d[3] = 0.9;
    for (double distance : {1e-15, 1e-9, 1e-3}) {
      const int below = count_above_scaled(d.data(), squares.data(), n, 0.7 - distance);
      const int above = count_above_scaled(d.data(), squares.data(), n, 0.7 + distance);
      EXPECT(below == n && above == 1, "n " << n << ", " << distance << ": " << below << " and " << above);
    }
    // At the tie itself every count from 1 to n is right.
    const int at = count_above_scaled(d.data(), squares.data(), n, 0.7);
    EXPECT(at >= 1 && at <= n, "at the tie: " << at);
  }
}

CATAPULT_TEST(cuda_scaled_count_agrees_with_pivots_on_random_matrices) {
  for (int trial = 0; trial < 200; ++trial) {
    const int n = 1 + trial;
    std::vector<double> d = normal<double>(n, 2 * trial), e = normal<double>(n, 2 * trial + 1),
                        squares(n, 0.0);
    for (int i = 0; i < n; ++i) {
      if (i % 7 == 3) e[i] *= 1e-12;
      d[i] /= 12.0;
      e[i] /= 12.0;
    }
    for (int i = 1; i < n; ++i) squares[i] = squared_coupling(e[i - 1]);
    for (double x : {-0.31, -0.1234, 0.0177, 0.2, 0.456}) {
      const int wanted = count_above(d.data(), e.data(), n, x, 1e-290);
      const int got = count_above_scaled(d.data(), squares.data(), n, x);
      EXPECT(got == wanted, "n " << n << " x " << x << ": got " << got << ", expected " << wanted);
    }
  }
}

CATAPULT_TEST(cuda_factored_solve_solves) {
  for (int n : {1, 2, 3, 40, 200}) {
    const std::vector<double> d = normal<double>(n, 3), e = normal<double>(n, 4), x = normal<double>(n, 5);
    const double shift = 0.37;
    const int64_t stride = 3;  // several shifts share the bands
    std::vector<double> right(n), bands(5 * n * stride);
    for (int i = 0; i < n; ++i)
      right[i] =
          (d[i] - shift) * x[i] + (i > 0 ? e[i - 1] * x[i - 1] : 0.0) + (i + 1 < n ? e[i] * x[i + 1] : 0.0);
    shifted_factor(d.data(), e.data(), n, shift, 1e-290, bands.data() + 1, stride);
    factored_solve(n, bands.data() + 1, stride, right.data());
    for (int i = 0; i < n; ++i)
      EXPECT(std::fabs(right[i] - x[i]) < 1e-9, "n " << n << " i " << i << ": " << right[i] << ", " << x[i]);
  }
}

CATAPULT_TEST(cuda_factored_solve_at_an_eigenvalue_gives_its_vector) {
  const int n = 60;
  const Laplacian t(n);
  std::vector<double> x = normal<double>(n, 6), bands(5 * n);
  const double lambda = t.eigenvalue(2);
  shifted_factor(t.d.data(), t.e.data(), n, lambda, kDoubleEpsilon, bands.data(), 1);
  for (int i = 0; i < kFusedIterations; ++i) {
    factored_solve(n, bands.data(), 1, x.data());
    double squares = 0.0;
    for (double value : x) squares += value * value;
    EXPECT(std::isfinite(squares), "overflow");
    for (double& value : x) value /= std::sqrt(squares);
  }
  for (int i = 0; i < n; ++i) {
    const double row =
        (0.5 - lambda) * x[i] - 0.25 * ((i > 0 ? x[i - 1] : 0.0) + (i + 1 < n ? x[i + 1] : 0.0));
    EXPECT(std::fabs(row) < 1e-14, "row " << i << ": residual " << row);
  }
}

CATAPULT_TEST(cuda_fused_plan_uses_shared_memory_where_it_fits) {
  const int64_t hopper = 227 * 1024;
  EXPECT(plan_fused(128, 10, hopper).vectors_in_shared, "top 10 of 128 never leave the chip");
  EXPECT(!plan_fused(256, 10, hopper).matrix_in_shared, "256 x 257 doubles are 514 KB");
  for (int64_t n : {1, 2, 48, 127, 128, 129, 168, 256})
    for (int64_t k : {int64_t{0}, int64_t{1}, n})
      for (int64_t limit : {int64_t{64 * 1024}, int64_t{99 * 1024}, int64_t{163 * 1024}, hopper}) {
        const FusedPlan plan = plan_fused(n, k, limit);
        EXPECT(plan.ld % 2 == 1 && plan.ld >= n, "rows of " << plan.ld);
        EXPECT(plan.panels * kPanelSide >= n, "panels " << plan.panels);
        EXPECT(plan.shared_bytes <= limit, "asks for " << plan.shared_bytes << " of " << limit);
        const int64_t fixed = kHouseholderArrays * plan.panels * kPanelSide + kReduceSlots + 1;
        EXPECT(plan.shared_bytes / 8 + plan.workspace_doubles == fixed + n * plan.ld + plan.vectors_doubles,
               "n " << n << " k " << k << ": a part has no place, or two");
      }
}

CATAPULT_TEST(cuda_warp_plan_fits) {
  for (int64_t n : {1, 5, 32, 33, 100, 128}) {
    EXPECT(plan_warp(n, 4).threads >= n, "a thread has one row");
    EXPECT(plan_warp(n, 4).shared_bytes <= 76 * 1024, "three blocks share a multiprocessor");
    EXPECT(plan_warp(n, 8).shared_bytes <= 163 * 1024, "beyond an A100");
  }
  EXPECT(plan_warp(100, 4).shared_bytes <= 227 * 1024 / 4, "500 matrices of 100 rows run at once on 132");
}

CATAPULT_TEST(cuda_fused_krylov_workspace_pieces_do_not_overlap) {
  const int64_t hopper = 227 * 1024;
  for (int64_t n : {257, 300, 2112, 2113, 5001})
    for (int64_t k : {1, 10, 11, 26}) {
      if (use_direct(n, k)) continue;
      EXPECT(use_fused_krylov(k), "k " << k);
      const KrylovFusedPlan plan = plan_krylov_fused(n, k, hopper);
      EXPECT(plan.block >= k + kKrylovGuard && (plan.block == 16 || plan.block == 32),
             "block " << plan.block);
      EXPECT(plan.basis <= kPanelSide && plan.basis <= n / 2, "basis " << plan.basis << " of n " << n);
      EXPECT(plan.cluster_shared_bytes <= hopper, "asks for " << plan.cluster_shared_bytes);
      EXPECT(plan.row_tiles == (n <= 2112 ? 1 : 2), "row tiles " << plan.row_tiles);
      const int64_t m = plan.basis, b = plan.block;
      const std::vector<std::pair<int64_t, int64_t>> pieces{
          {plan.vectors, m * n},
          {plan.products, m * n},
          {plan.ritz_values, b},
          {plan.bands, b == 16 ? 0 : 5 * m * b},
          {plan.fallback, plan_direct(n, k, hopper).workspace_doubles},
          {plan.fallback_vectors, (n + 1) * k},
          {plan.flag, 1}};
      for (size_t i = 0; i + 1 < pieces.size(); ++i)
        EXPECT(pieces[i].first + pieces[i].second <= pieces[i + 1].first,
               "piece " << i << " overlaps the next");
      EXPECT(plan.flag + 1 == plan.total_doubles, "the flag is the last word");
    }
  EXPECT(!use_fused_krylov(27), "48 columns do not fit");
}

}  // namespace catapult::tests
