// Scalar algorithms on a symmetric tridiagonal T (diagonal d[n], off-diagonal e[n - 1]) that one
// thread runs. The same code is compiled for the device and, in the native tests, for the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/plans.h"

namespace catapult::cuda {

// Number of eigenvalues of T above x: positive pivots of T - x (Sylvester). A vanishing pivot is
// moved off zero by less than rounding; NaN gives a count, not an endless loop.
CATAPULT_HOST_DEVICE inline int count_above(const double* d, const double* e, int64_t n, double x,
                                            double tiny) {
  int count = 0;
  double pivot = 1.0;
  for (int64_t i = 0; i < n; ++i) {
    const double coupling = i == 0 ? 0.0 : e[i - 1] * e[i - 1] / pivot;
    pivot = d[i] - x - coupling;
    if (std::fabs(pivot) < tiny) pivot = -tiny;
    count += pivot > 0.0;
  }
  return count;
}

// An interval that contains all eigenvalues of T (Gershgorin).
CATAPULT_HOST_DEVICE inline void gershgorin(const double* d, const double* e, int64_t n, double& low,
                                            double& high) {
  low = d[0];
  high = d[0];
  for (int64_t i = 0; i < n; ++i) {
    const double radius = (i > 0 ? std::fabs(e[i - 1]) : 0.0) + (i + 1 < n ? std::fabs(e[i]) : 0.0);
    low = d[i] - radius < low ? d[i] - radius : low;
    high = d[i] + radius > high ? d[i] + radius : high;
  }
}

// One round of multisection looks at kSections shifts inside (low, high).
constexpr int kSections = 32;
constexpr int kSectionRounds = 24;  // 33^24 divides any interval of doubles to nothing

template <int kCount = kSections>
CATAPULT_HOST_DEVICE inline double section(double low, double high, int index) {
  return low + (high - low) * (static_cast<double>(index + 1) / (kCount + 1));
}

// Given which shifts have more than `rank` eigenvalues above them (bit i for shift i), the new interval.
template <int kCount = kSections>
CATAPULT_HOST_DEVICE inline void narrow_interval(unsigned above, double& low, double& high) {
  int last = -1;  // highest shift that is still below the eigenvalue
  for (int i = 0; i < kCount; ++i)
    if ((above >> i) & 1u) last = i;
  const double new_low = last < 0 ? low : section<kCount>(low, high, last);
  const double new_high = last + 1 < kCount ? section<kCount>(low, high, last + 1) : high;
  low = new_low;
  high = new_high;
}

constexpr double kDoubleEpsilon = 2.220446049250313e-16;

// Square of an off-diagonal element of a T with spectral radius 1 for the function below: not below what a
// change of T by a quarter of rounding gives, so that two determinants in a row never vanish.
CATAPULT_HOST_DEVICE inline double squared_coupling(double e) {
  const double least = 0.25 * kDoubleEpsilon;
  return e * e > least * least ? e * e : least * least;
}

// count_above without divisions, whose latency is most of its time: signs of the leading determinants of
// T - x. T has a spectral radius of at most 1, |x| <= 2, squares[i] (0 for i = 0) couples i - 1 and i.
CATAPULT_HOST_DEVICE inline int count_above_scaled(const double* d, const double* squares, int n, double x) {
  constexpr int kRun = 8;  // steps change the size by factors of 3 to 1e-17 each: 8 of them stay in range
  int count = 0;
  double before = 0.0, current = 1.0;
  auto advance = [&](int i) {
    const double next = (d[i] - x) * current - squares[i] * before;
    count += (next > 0.0) == (current > 0.0);
    before = current;
    current = next;
  };
  int i = 0;
  for (; i + kRun <= n; i += kRun) {
    for (int j = 0; j < kRun; ++j) advance(i + j);
    const double size = std::fmax(std::fabs(before), std::fabs(current));
    const double factor = size < 0x1p-300 ? 0x1p600 : size > 0x1p300 ? 0x1p-600 : 1.0;
    before *= factor;
    current *= factor;
  }
  for (; i < n; ++i) advance(i);
  return count;
}

// Elimination of T - lambda with row exchanges, for factored_solve: entry i of band q at
// bands[(5 i + q) * stride] holds 1 / pivot, the two bands right of it over the pivot, the factor of the row
// below, and whether that row was exchanged. A pivot below `tiny` becomes `tiny`.
CATAPULT_HOST_DEVICE inline void shifted_factor(const double* d, const double* e, int n, double lambda,
                                                double tiny, double* bands, int64_t stride) {
  double pivot = d[0] - lambda, upper = n > 1 ? e[0] : 0.0;
  for (int i = 0; i < n; ++i) {
    const bool end = i + 1 == n;
    const double low = end ? 0.0 : e[i], diagonal = end ? 0.0 : d[i + 1] - lambda;
    const double next = i + 2 < n ? e[i + 1] : 0.0;
    const bool exchange = std::fabs(low) > std::fabs(pivot);
    if (!exchange && std::fabs(pivot) < tiny) pivot = pivot < 0.0 ? -tiny : tiny;
    const double inverse = 1.0 / (exchange ? low : pivot);
    const double factor = (exchange ? pivot : low) * inverse;
    double* band = bands + 5 * i * stride;
    band[0] = inverse;
    band[stride] = (exchange ? diagonal : upper) * inverse;
    band[2 * stride] = exchange ? next * inverse : 0.0;
    band[3 * stride] = factor;
    band[4 * stride] = exchange ? 1.0 : 0.0;
    pivot = exchange ? upper - factor * diagonal : diagonal - factor * upper;
    upper = exchange ? -factor * next : next;
  }
}

// Solves (T - lambda) x = x in place.
CATAPULT_HOST_DEVICE inline void factored_solve(int n, const double* bands, int64_t stride, double* x) {
  double right = x[0];
  for (int i = 0; i < n; ++i) {
    const double* band = bands + 5 * i * stride;
    const bool exchange = band[4 * stride] != 0.0;
    const double next = i + 1 < n ? x[i + 1] : 0.0;
    x[i] = (exchange ? next : right) * band[0];
    right = exchange ? right - band[3 * stride] * next : next - band[3 * stride] * right;
  }
  double after = 0.0, after_next = 0.0;
  for (int i = n - 1; i >= 0; --i) {
    const double* band = bands + 5 * i * stride;
    const double value = x[i] - band[2 * stride] * after_next - band[stride] * after;
    x[i] = value;
    after_next = after;
    after = value;
  }
}

// Solves (T - lambda) x = x in place: elimination with row exchanges. `bands` holds the three upper
// bands of the eliminated matrix, entry i of band q at bands[(3 i + q) * stride]; x has the stride
// x_stride. A pivot below `tiny` becomes `tiny`, so a shift that is an eigenvalue gives its vector.
CATAPULT_HOST_DEVICE inline void shifted_solve(const double* d, const double* e, int64_t n, double lambda,
                                               double tiny, double* x, int64_t x_stride, double* bands,
                                               int64_t stride) {
  double pivot = d[0] - lambda, upper = n > 1 ? e[0] : 0.0, right = x[0];
  for (int64_t i = 0; i + 1 < n; ++i) {
    const double low = e[i], diagonal = d[i + 1] - lambda, next = i + 2 < n ? e[i + 1] : 0.0;
    const double next_right = x[(i + 1) * x_stride];
    double* band = bands + 3 * i * stride;
    if (std::fabs(low) > std::fabs(pivot)) {  // exchange rows i and i + 1
      const double factor = pivot / low;
      band[0] = low;
      band[stride] = diagonal;
      band[2 * stride] = next;
      x[i * x_stride] = next_right;
      pivot = upper - factor * diagonal;
      upper = -factor * next;
      right -= factor * next_right;
    } else {
      if (std::fabs(pivot) < tiny) pivot = pivot < 0.0 ? -tiny : tiny;
      const double factor = low / pivot;
      band[0] = pivot;
      band[stride] = upper;
      band[2 * stride] = 0.0;
      x[i * x_stride] = right;
      pivot = diagonal - factor * upper;
      upper = next;
      right = next_right - factor * right;
    }
  }
  if (std::fabs(pivot) < tiny) pivot = pivot < 0.0 ? -tiny : tiny;
  double after = right / pivot, after_next = 0.0;
  x[(n - 1) * x_stride] = after;
  for (int64_t i = n - 2; i >= 0; --i) {
    const double* band = bands + 3 * i * stride;
    const double value = (x[i * x_stride] - band[stride] * after - band[2 * stride] * after_next) / band[0];
    x[i * x_stride] = value;
    after_next = after;
    after = value;
  }
}

// |last component| of the unit eigenvector of T for its largest eigenvalue theta: the Lanczos
// residual is beta times it. Pivots of T - theta from the top are negative but for rounding.
CATAPULT_HOST_DEVICE inline double last_component(const double* d, const double* e, int64_t n, double theta,
                                                  double tiny) {
  double squares = 1.0;  // of z_0 .. z_i relative to z_i
  double pivot = d[0] - theta;
  for (int64_t i = 0; i + 1 < n; ++i) {
    if (std::fabs(pivot) < tiny) pivot = -tiny;
    const double ratio = e[i] / pivot;  // |z_i / z_{i+1}|
    squares = 1.0 + squares * ratio * ratio;
    if (!(squares < 1e300)) return 0.0;  // beyond range: the component is smaller than 1e-150
    pivot = d[i + 1] - theta - e[i] * ratio;
  }
  return 1.0 / std::sqrt(squares);
}

// Lanczos looks at its residual after these step counts: 3, 4, 6, 8, 12, 16, 24, 32, 48, ...
CATAPULT_HOST_DEVICE inline bool lanczos_checks(int64_t step) {
  if (step < 3) return false;
  int64_t power = 2;
  while (power * 2 <= step) power *= 2;
  return step == power || step == power + power / 2;
}

}  // namespace catapult::cuda
