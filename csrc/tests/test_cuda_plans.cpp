// Host side of the CUDA kernels, and the scalar algorithms that device threads run.
#include <algorithm>
#include <set>

#include "cuda/jacobian_plan.h"
#include "cuda/ntk_gram_plan.h"
#include "cuda/plans.h"
#include "cuda/tridiagonal.h"
#include "test.h"

namespace catapult::tests {

using namespace catapult::cuda;

CATAPULT_TEST(cuda_triangle_tile_enumerates_the_lower_triangle) {
  int64_t index = 0;
  for (int64_t row = 0; row < 300; ++row)
    for (int64_t column = 0; column <= row; ++column, ++index) {
      int64_t r = -1, c = -1;
      triangle_tile(index, r, c);
      EXPECT(r == row && c == column, "index " << index << ": got " << r << ", " << c);
    }
  // Far out, where the square root is not exact: the first and the last tile of a row.
  for (int64_t row : {int64_t{65535}, int64_t{94906266}, int64_t{3000000000}}) {
    int64_t r = -1, c = -1;
    triangle_tile(triangle(row), r, c);
    EXPECT(r == row && c == 0, "first of row " << row << ": got " << r << ", " << c);
    triangle_tile(triangle(row + 1) - 1, r, c);
    EXPECT(r == row && c == row, "last of row " << row << ": got " << r << ", " << c);
  }
}

CATAPULT_TEST(cuda_gram_plan_covers_every_column_once) {
  std::mt19937_64 source(1);
  auto pick = [&source](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(source);
  };
  for (int trial = 0; trial < 2000; ++trial) {
    const int terms = static_cast<int>(pick(1, kMaxTerms));
    int64_t a[kMaxTerms], b[kMaxTerms];
    for (int i = 0; i < terms; ++i) {
      a[i] = trial % 3 == 0 ? 0 : pick(0, 5000);
      b[i] = pick(0, 100000);
    }
    const bool symmetric = trial % 2 == 0;
    const int64_t rows = pick(0, 3000), columns = symmetric ? rows : pick(0, 3000);
    const GramPlan plan = plan_gram(rows, columns, symmetric, a, b, terms);
    EXPECT(plan.row_tiles * kTile >= rows && (plan.row_tiles - 1) * kTile < rows, "rows " << rows);
    EXPECT(plan.column_tiles * kTile >= columns && (plan.column_tiles - 1) * kTile < columns,
           "columns " << columns);
    EXPECT(plan.tiles == (symmetric ? triangle(plan.row_tiles) : plan.row_tiles * plan.column_tiles),
           "tiles " << plan.tiles);
    if (!plan.split) {
      EXPECT(gram_workspace_bytes(plan, terms, 8) == 0, "a plan without parts asks for memory");
      continue;
    }
    for (int i = 0; i < 2 * terms; ++i) {
      const int64_t depth = i % 2 == 0 ? a[i / 2] : b[i / 2];
      const int64_t parts = plan.first_part[i + 1] - plan.first_part[i];
      EXPECT(plan.columns_per_part[i] % kPromote == 0, "part of " << plan.columns_per_part[i] << " columns");
      EXPECT(parts * plan.columns_per_part[i] >= depth, "product " << i << ": columns are left out");
      EXPECT((parts - 1) * plan.columns_per_part[i] < depth, "product " << i << ": an empty part");
    }
    // One part of each product may be short: at most that much above the target.
    EXPECT(plan.parts(terms) * plan.tiles <= kTargetBlocks + 2 * terms * plan.tiles,
           plan.parts(terms) * plan.tiles << " blocks");
    EXPECT(gram_workspace_bytes(plan, terms, 4) == plan.parts(terms) * plan.tiles * kTile * kTile * 4,
           "workspace");
  }
}

CATAPULT_TEST(cuda_gram_plan_splits_only_small_problems) {
  const int64_t width = 1024;
  EXPECT(plan_gram(128, 128, true, &width, &width, 1).split, "n = 128 leaves a GPU idle");
  EXPECT(!plan_gram(2000, 2000, true, &width, &width, 1).split, "n = 2000 has 528 tiles");
  const int64_t narrow = 16;
  EXPECT(!plan_gram(64, 64, true, &narrow, &narrow, 0).split, "no layers");
}

CATAPULT_TEST(cuda_fast_gram_plan_covers_every_column_once) {
  std::mt19937_64 source(3);
  auto pick = [&source](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(source);
  };
  int large_plans = 0, split_plans = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    const int terms = static_cast<int>(pick(1, kMaxTerms));
    int64_t a[kMaxTerms], b[kMaxTerms];
    for (int i = 0; i < terms; ++i) {
      a[i] = pick(0, trial % 3 == 0 ? 6 : 5000);
      b[i] = pick(0, trial % 5 == 0 ? 6 : 5000);
    }
    const bool symmetric = trial % 2 == 0, large_tiles = trial % 7 != 0;
    const int cluster = trial % 4 == 1 ? kClusterBlocks : 1;
    const int64_t most = trial % 3 == 1 ? 400 : 6000;
    const int64_t rows = pick(0, most), columns = symmetric ? rows : pick(0, most);
    const FastGramPlan plan = plan_gram_fast(rows, columns, symmetric, a, b, terms, large_tiles, cluster);
    const GramPlan& gram = plan.gram;
    const int64_t side = plan.side;
    EXPECT(side == kTile || (side == kLargeTile && large_tiles && !gram.split), "tiles of " << side);
    EXPECT(gram.row_tiles * side >= rows && (gram.row_tiles - 1) * side < rows, "rows " << rows);
    EXPECT(gram.column_tiles * side >= columns && (gram.column_tiles - 1) * side < columns,
           "columns " << columns);
    EXPECT(gram.tiles == (symmetric ? triangle(gram.row_tiles) : gram.row_tiles * gram.column_tiles),
           "tiles " << gram.tiles);
    large_plans += side == kLargeTile;
    if (!gram.split) {
      EXPECT(gram_workspace_bytes(gram, terms, 8) == 0, "a plan without parts asks for memory");
      continue;
    }
    ++split_plans;
    int64_t wide = 0;
    for (int i = 0; i < 2 * terms; ++i) {
      const int64_t depth = i % 2 == 0 ? a[i / 2] : b[i / 2];
      const int64_t parts = gram.first_part[i + 1] - gram.first_part[i];
      wide += depth > kNarrow;
      if (depth <= kNarrow) {
        EXPECT(parts == 0, "product " << i << ": " << depth << " columns have parts");
        continue;
      }
      EXPECT(gram.columns_per_part[i] % kPartChunk == 0,
             "part of " << gram.columns_per_part[i] << " columns");
      EXPECT(parts * gram.columns_per_part[i] >= depth, "product " << i << ": columns are left out");
      EXPECT((parts - 1) * gram.columns_per_part[i] < depth, "product " << i << ": an empty part");
    }
    EXPECT(gram.parts(terms) * gram.tiles <= 2 * kNominalProcessors / cluster + wide * gram.tiles,
           gram.parts(terms) * gram.tiles << " parts");
  }
  EXPECT(large_plans > 100 && split_plans > 1000, large_plans << " large, " << split_plans << " split");
}

CATAPULT_TEST(cuda_fast_gram_plan_chooses_tiles_by_waves) {
  const int64_t width = 1024;
  auto side = [&width](int64_t n) { return plan_gram_fast(n, n, true, &width, &width, 1, true, 1).side; };
  EXPECT(side(2000) == kTile, "528 small tiles are 4 for each of 132; 136 large ones are 2 for some");
  EXPECT(side(1900) == kLargeTile, "120 large tiles are one wave");
  EXPECT(side(5000) == kLargeTile, "many waves either way");
  EXPECT(plan_gram_fast(5000, 5000, true, &width, &width, 1, false, 1).side == kTile,
         "no kernel for large tiles");
}

CATAPULT_TEST(cuda_fast_gram_plan_fills_the_device_at_128_samples) {
  // The layers of an FCN of five layers; the last sensitivity has one column.
  const int64_t a[5] = {3072, 1024, 1024, 1024, 1024}, b[5] = {1024, 1024, 1024, 1024, 1};
  const FastGramPlan parts = plan_gram_fast(128, 128, true, a, b, 5, true, 1);
  EXPECT(parts.gram.split && parts.gram.tiles == 3 && parts.gram.parts(5) == 88, parts.gram.parts(5)
                                                                                     << " parts");
  const FastGramPlan clusters = plan_gram_fast(128, 128, true, a, b, 5, true, kClusterBlocks);
  EXPECT(clusters.gram.split && clusters.gram.parts(5) == 11, clusters.gram.parts(5) << " parts");
  EXPECT(clusters.gram.columns_per_part[0] == 1024, "a block takes 128 columns");
}

CATAPULT_TEST(cuda_gradient_tile_rows_fit_the_bound) {
  std::mt19937_64 source(2);
  auto pick = [&source](int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(source); };
  for (int trial = 0; trial < 2000; ++trial) {
    const int64_t rows = pick(600), columns = pick(5000), samples = pick(300), bytes = pick(64 << 20);
    const int64_t tile = gradient_tile_rows(rows, columns, samples, 4, bytes);
    EXPECT(tile >= 1 && tile <= rows, "tile of " << tile << " rows of " << rows);
    EXPECT(tile == 1 || tile * columns * samples * 4 <= bytes, "tile of " << tile << " rows is too large");
    EXPECT(tile == rows || (tile + 1) * columns * samples * 4 > bytes,
           "tile of " << tile << " rows is too small");
  }
  EXPECT(gradient_tile_rows(0, 0, 0, 4, 100) == 1, "empty weights have a tile");
}

CATAPULT_TEST(cuda_gradient_sweep_covers_the_weight_within_its_bound) {
  std::mt19937_64 source(3);
  auto pick = [&source](int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(source); };
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t samples = pick(trial % 2 == 0 ? 300 : 6000), groups = trial % 3 == 0 ? pick(64) : 1;
    const int64_t rows = pick(600), taps = pick(trial % 5 == 0 ? 30 : 5000), bytes = pick(64 << 20);
    const GradientSweep sweep = plan_gradient_sweep(samples, groups, rows, taps, 4, bytes);
    EXPECT(sweep.tile_groups >= 1 && sweep.tile_groups <= groups,
           "tile of " << sweep.tile_groups << " groups");
    EXPECT(sweep.tile_rows >= 1 && sweep.tile_rows <= rows, "tile of " << sweep.tile_rows << " rows");
    EXPECT(sweep.tile_taps >= 1 && sweep.tile_taps <= taps, "tile of " << sweep.tile_taps << " taps");
    EXPECT(sweep.tile_groups == 1 || (sweep.tile_rows == rows && sweep.tile_taps == taps),
           "several groups, but not all of one");
    EXPECT(sweep.columns() <= std::max(taps, bytes / (4 * samples)), sweep.columns() << " weights in a tile");
    // No tile is smaller than a quarter of what it may be, unless there is no more.
    const int64_t most = std::min(std::max(taps, bytes / (4 * samples)), groups * rows * taps);
    EXPECT(4 * sweep.columns() >= most || sweep.tile_groups > 1,
           sweep.columns() << " of " << most << " weights: " << sweep.tile_rows << " of " << rows << " rows, "
                           << sweep.tile_taps << " of " << taps << " taps");
    for (bool large : {false, true}) {
      const int side = gradient_side(sweep, sweep.tile_rows, sweep.tile_taps, large);
      EXPECT(side == kTile || (large && side == kLargeTile), "side " << side);
      const AccumulatePlan plan = plan_accumulate(sweep, large);
      EXPECT(plan.tiles == triangle(ceil_div(samples, plan.side)), plan.tiles << " tiles");
      EXPECT(plan.parts >= 1 && (plan.parts == 1 || plan.parts * plan.tiles <= kPartBlocks), "parts");
      EXPECT(plan.parts == 1 || plan.side == kTile, "parts are added up in tiles of kTile");
      for (int64_t columns : {int64_t{1}, int64_t{17}, sweep.columns()}) {
        const int64_t each = plan.columns_per_part(columns);
        EXPECT(each * plan.parts >= columns, "columns are left out");
        EXPECT(plan.parts == 1 || each % 16 == 0, "part of " << each << " columns");
      }
      EXPECT(plan.partial_elements() == (plan.parts == 1 ? 0 : plan.parts * plan.tiles * kTile * kTile),
             "workspace");
    }
  }
}

CATAPULT_TEST(cuda_gradient_sweep_of_the_networks_of_the_paper) {
  // 128 samples, 512 channels of 3 x 3: blocks of 128 x 128, about two for each multiprocessor.
  const GradientSweep wide = plan_gradient_sweep(128, 1, 512, 4608, 4, 8 * 4608 * 128 * 4);
  EXPECT(wide.tile_rows == 128 && wide.tile_taps == 256, wide.tile_rows << " x " << wide.tile_taps);
  EXPECT(gradient_side(wide, 128, 256, true) == kLargeTile, "small blocks");
  EXPECT(plan_accumulate(wide, true).parts == 176, plan_accumulate(wide, true).parts << " parts");
  // 5,000 samples: as little memory as one channel takes, straight into K.
  const GradientSweep many = plan_gradient_sweep(5000, 1, 512, 4608, 4, 8 << 20);
  EXPECT(many.tile_rows == 64 && many.tile_taps == 64, many.tile_rows << " x " << many.tile_taps);
  EXPECT(plan_accumulate(many, true).side == kLargeTile && plan_accumulate(many, true).parts == 1, "K");
}

CATAPULT_TEST(cuda_krylov_workspace_pieces_do_not_overlap) {
  for (int64_t n : {257, 300, 1000, 5001})
    for (int64_t k : {1, 10, 11, 26}) {
      if (use_direct(n, k)) continue;
      const KrylovPlan plan = plan_krylov(n, k, 227 * 1024);
      EXPECT(plan.block >= k + kKrylovGuard && plan.block % 16 == 0, "block " << plan.block);
      EXPECT(plan.basis <= n / 2, "basis " << plan.basis << " of n " << n);
      const int64_t m = plan.basis, b = plan.block;
      const std::vector<std::pair<int64_t, int64_t>> pieces{
          {plan.vectors, m * n},
          {plan.products, m * n},
          {plan.next_vectors, b * n},
          {plan.next_products, b * n},
          {plan.projected, m * m},
          {plan.ritz_values, b},
          {plan.ritz_vectors, m * b},
          {plan.ritz_residuals, b},
          {plan.partials, plan.rotate_blocks * b},
          {plan.direct, plan_direct(m, b, 227 * 1024).workspace_doubles},
          {plan.fallback, plan_direct(n, k, 227 * 1024).workspace_doubles},
          {plan.fallback_vectors, (n + 1) * k},
          {plan.flag, 1}};
      std::vector<std::pair<int64_t, int64_t>> sorted = pieces;
      std::sort(sorted.begin(), sorted.end());
      for (size_t i = 0; i + 1 < sorted.size(); ++i)
        EXPECT(sorted[i].first + sorted[i].second <= sorted[i + 1].first,
               "piece " << i << " overlaps the next");
      EXPECT(sorted.back().first + sorted.back().second <= plan.total_doubles, "beyond the end");
    }
  EXPECT(use_direct(256, 1) && !use_direct(257, 1) && use_direct(257, 257), "choice of the solver");
}

CATAPULT_TEST(cuda_direct_plan_uses_shared_memory_where_the_matrix_fits) {
  EXPECT(plan_direct(128, 10, 227 * 1024).matrix_in_shared, "128 x 128 doubles are 128 KB");
  EXPECT(!plan_direct(128, 10, 99 * 1024).matrix_in_shared, "not on a small chip");
  for (int64_t n : {1, 64, 200})
    for (int64_t limit : {48 * 1024, 163 * 1024, 227 * 1024}) {
      const DirectPlan plan = plan_direct(n, n, limit);
      EXPECT(plan.shared_bytes <= limit, "asks for " << plan.shared_bytes << " of " << limit);
      EXPECT(plan.workspace_doubles == direct_scratch_doubles(n, n) + (plan.matrix_in_shared ? 0 : n * n),
             "workspace");
      EXPECT(plan_lanczos(n, 8).shared_bytes <= 48 * 1024, "Lanczos asks for too much");
    }
}

// --- tridiagonal matrices; the one with 2 and -1 has eigenvalues 2 - 2 cos(pi j / (n + 1)) ---

struct Tridiagonal {
  std::vector<double> d, e;
  explicit Tridiagonal(int64_t n) : d(n, 2.0), e(n, -1.0) {}
  double eigenvalue(int64_t rank) const {  // 0 is the largest
    const double n = static_cast<double>(d.size());
    return 2.0 - 2.0 * std::cos(std::acos(-1.0) * (n - static_cast<double>(rank)) / (n + 1.0));
  }
};

CATAPULT_TEST(cuda_sturm_count_is_exact_between_eigenvalues) {
  for (int64_t n : {1, 2, 5, 33, 200}) {
    const Tridiagonal t(n);
    for (int64_t rank = 0; rank + 1 < n; ++rank) {
      const double between = 0.5 * (t.eigenvalue(rank) + t.eigenvalue(rank + 1));
      EXPECT(count_above(t.d.data(), t.e.data(), n, between, 1e-290) == rank + 1,
             "n " << n << " rank " << rank);
    }
    EXPECT(count_above(t.d.data(), t.e.data(), n, -1.0, 1e-290) == n, "all are positive");
    EXPECT(count_above(t.d.data(), t.e.data(), n, 4.5, 1e-290) == 0, "all are below 4");
  }
}

CATAPULT_TEST(cuda_multisection_reaches_full_precision) {
  const int64_t n = 100;
  const Tridiagonal t(n);
  double low0, high0;
  gershgorin(t.d.data(), t.e.data(), n, low0, high0);
  EXPECT(low0 <= t.eigenvalue(n - 1) && high0 >= t.eigenvalue(0), "the bounds hold all eigenvalues");
  for (int64_t rank : {0, 1, 50, 99}) {
    double low = low0, high = high0;
    int rounds = 0;
    for (; rounds < kSectionRounds && high - low > 1e-15; ++rounds) {
      unsigned above = 0;
      for (int i = 0; i < kSections; ++i)
        above |= unsigned{count_above(t.d.data(), t.e.data(), n, section(low, high, i), 1e-290) > rank} << i;
      narrow_interval(above, low, high);
    }
    EXPECT(rounds < kSectionRounds, "rank " << rank << " did not settle");
    EXPECT(std::fabs(low - t.eigenvalue(rank)) < 4e-15,
           "rank " << rank << ": off by " << low - t.eigenvalue(rank));
  }
}

CATAPULT_TEST(cuda_narrow_interval_keeps_the_eigenvalue) {
  double low = 0.0, high = 33.0;
  narrow_interval(0u, low, high);
  EXPECT(low == 0.0 && high == 1.0, "none above: " << low << ", " << high);
  low = 0.0, high = 33.0;
  narrow_interval(0xffffffffu, low, high);
  EXPECT(low == 32.0 && high == 33.0, "all above: " << low << ", " << high);
  low = 0.0, high = 33.0;
  narrow_interval(0x7u, low, high);
  EXPECT(low == 3.0 && high == 4.0, "three above: " << low << ", " << high);
}

CATAPULT_TEST(cuda_shifted_solve_solves) {
  for (int64_t n : {1, 2, 3, 40}) {
    Tridiagonal t(n);
    const std::vector<double> d = normal<double>(n, 3), e = normal<double>(n, 4), x = normal<double>(n, 5);
    const double shift = 0.37;
    const int64_t stride = 3;  // several shifts share the bands
    std::vector<double> right(2 * n), bands(3 * n * stride);
    for (int64_t i = 0; i < n; ++i)
      right[2 * i] =
          (d[i] - shift) * x[i] + (i > 0 ? e[i - 1] * x[i - 1] : 0.0) + (i + 1 < n ? e[i] * x[i + 1] : 0.0);
    shifted_solve(d.data(), e.data(), n, shift, 1e-290, right.data(), 2, bands.data(), stride);
    for (int64_t i = 0; i < n; ++i)
      EXPECT(std::fabs(right[2 * i] - x[i]) < 1e-10,
             "n " << n << " i " << i << ": " << right[2 * i] << ", " << x[i]);
  }
}

CATAPULT_TEST(cuda_shifted_solve_at_an_eigenvalue_gives_its_vector) {
  const int64_t n = 60;
  const Tridiagonal t(n);
  std::vector<double> x = normal<double>(n, 6), bands(3 * n);
  const double lambda = t.eigenvalue(2);
  for (int i = 0; i < 3; ++i) {
    shifted_solve(t.d.data(), t.e.data(), n, lambda, 1e-16, x.data(), 1, bands.data(), 1);
    double squares = 0.0;
    for (double value : x) squares += value * value;
    EXPECT(std::isfinite(squares), "overflow");
    for (double& value : x) value /= std::sqrt(squares);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double row = (2.0 - lambda) * x[i] - (i > 0 ? x[i - 1] : 0.0) - (i + 1 < n ? x[i + 1] : 0.0);
    EXPECT(std::fabs(row) < 1e-14, "row " << i << ": residual " << row);
  }
}

CATAPULT_TEST(cuda_last_component_of_the_top_vector) {
  for (int64_t n : {1, 2, 10, 50}) {
    const Tridiagonal t(n);
    // Component i of the top vector: sin(pi n i / (n + 1)), norm sqrt((n + 1) / 2).
    const double pi = std::acos(-1.0), nn = static_cast<double>(n);
    const double exact = std::fabs(std::sin(pi * nn * nn / (nn + 1.0))) / std::sqrt((nn + 1.0) / 2.0);
    const double got = last_component(t.d.data(), t.e.data(), n, t.eigenvalue(0), 1e-290);
    EXPECT(std::fabs(got - exact) < 1e-10, "n " << n << ": " << got << ", " << exact);
  }
}

CATAPULT_TEST(cuda_lanczos_checks_at_growing_steps) {
  std::vector<int64_t> steps;
  for (int64_t step = 0; step <= 64; ++step)
    if (lanczos_checks(step)) steps.push_back(step);
  EXPECT((steps == std::vector<int64_t>{3, 4, 6, 8, 12, 16, 24, 32, 48, 64}),
         "got " << steps.size() << " steps");
}

}  // namespace catapult::tests
