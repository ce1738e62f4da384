#include "core/ntk_gram.h"
#include "test.h"

namespace catapult::tests {
namespace {

// One layer with room between rows: [n, a_cols] of stride a_cols + 3, [n, c, b_cols] of strides (c b_cols +
// 5, b_cols).
template <typename T>
struct Layer {
  int64_t n, c, a_cols, b_cols;
  double scale, beta;
  std::vector<T> a, b;

  Layer(int64_t n, int64_t c, int64_t a_cols, int64_t b_cols, double scale, double beta, unsigned seed)
      : n(n),
        c(c),
        a_cols(a_cols),
        b_cols(b_cols),
        scale(scale),
        beta(beta),
        a(normal<T>(n * (a_cols + 3), seed)),
        b(normal<T>(n * (c * b_cols + 5), seed + 1)) {}

  GramTerm term() const {
    return {a.data(), a_cols + 3, a_cols, b.data(), c * b_cols + 5, b_cols, b_cols, scale, beta};
  }
};

// Entry (row of x, column of z) in double.
template <typename T>
double entry(const Layer<T>& x, const Layer<T>& z, int64_t row, int64_t column) {
  const GramTerm left = x.term(), right = z.term();
  const T* a = static_cast<const T*>(left.a) + row / x.c * left.a_stride;
  const T* e = static_cast<const T*>(right.a) + column / x.c * right.a_stride;
  const T* b = static_cast<const T*>(left.b) + row / x.c * left.b_stride + row % x.c * left.b_output_stride;
  const T* f =
      static_cast<const T*>(right.b) + column / x.c * right.b_stride + column % x.c * right.b_output_stride;
  double features = x.beta, sensitivities = 0;
  for (int64_t k = 0; k < x.a_cols; ++k) features += double(a[k]) * double(e[k]);
  for (int64_t k = 0; k < x.b_cols; ++k) sensitivities += double(b[k]) * double(f[k]);
  return x.scale * features * sensitivities;
}

template <typename T>
void switch_off_half(std::vector<T>& values) {
  for (T& value : values)
    if (value < T(0)) value = T(0);
}

template <typename T>
void check_symmetric(int64_t n, int64_t c, int threads, bool zeros = false) {
  Layer<T> first(n, c, 37, zeros ? 131 : 5, 0.5, 0.2, 1), second(n, c, 0, 1, 2.0, 1.5, 2),
      third(n, c, 1025, 1, 1.0, 0.0, 3);
  if (zeros) switch_off_half(first.b), switch_off_half(third.a);
  const Layer<T>* layers[] = {&first, &second, &third};
  const GramTerm terms[] = {first.term(), second.term(), third.term()};
  const int64_t size = n * c, stride = size + 2;
  std::vector<T> kernel = poison<T>(size * stride);
  const bool finite = ntk_gram({dtype_of<T>(), n, c, terms, 3, kernel.data(), stride, false, threads});
  EXPECT(finite, "n=" << n << " c=" << c);
  std::vector<double> exact(size * size);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j)
      for (const Layer<T>* layer : layers) exact[i * size + j] += entry(*layer, *layer, i, j);
  double worst = 0;
  bool symmetric = true, padding_untouched = true;
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      const double norm = std::sqrt(exact[i * size + i] * exact[j * size + j]);
      const double error = std::fabs(double(kernel[i * stride + j]) - exact[i * size + j]) / norm;
      if (!(error <= worst)) worst = error;  // a NaN is kept
      symmetric = symmetric && kernel[i * stride + j] == kernel[j * stride + i];
    }
    for (int64_t j = size; j < stride; ++j)
      padding_untouched = padding_untouched && std::isnan(kernel[i * stride + j]);
  }
  EXPECT(worst <= gram_bound<T>(), "n=" << n << " c=" << c << " error " << worst);
  EXPECT(symmetric, "n=" << n << " c=" << c);
  EXPECT(padding_untouched, "n=" << n << " c=" << c);
}

CATAPULT_TEST(ntk_gram_symmetric) {
  for_each_simd_level([] {
    for (int64_t n : {0, 1, 2, 5, 31, 33, 61}) {
      check_symmetric<float>(n, 1, 1);
      check_symmetric<double>(n, 1, 1);
    }
    for (int64_t c : {2, 61}) {
      check_symmetric<float>(4, c, 1);
      check_symmetric<double>(4, c, 1);
    }
    check_symmetric<float>(127, 1, 3);
    check_symmetric<double>(129, 1, 3);
    check_symmetric<double>(481, 1, 2);  // packed, in more than one block
    check_symmetric<float>(257, 1, 1, true);
    check_symmetric<float>(131, 2, 3, true);
    check_symmetric<double>(263, 1, 2, true);
  });
}

template <typename T>
void check_cross(int64_t n, int64_t m, int64_t c, int threads) {
  const Layer<T> x(n, c, 100, 17, 0.5, 0.2, 4), z(m, c, 100, 17, 0.5, 0.2, 6);
  const GramTerm x_term = x.term(), z_term = z.term();
  std::vector<T> kernel(n * c * m * c, T(3));
  const bool finite =
      ntk_gram_cross({dtype_of<T>(), n, m, c, &x_term, &z_term, 1, kernel.data(), m * c, true, threads});
  EXPECT(finite, "");
  double worst = 0;
  for (int64_t i = 0; i < n * c; ++i)
    for (int64_t j = 0; j < m * c; ++j) {
      const double norm = std::sqrt(entry(x, x, i, i) * entry(z, z, j, j)) + 3;
      const double error = std::fabs(double(kernel[i * m * c + j]) - 3 - entry(x, z, i, j)) / norm;
      if (!(error <= worst)) worst = error;
    }
  EXPECT(worst <= gram_bound<T>(), "n=" << n << " m=" << m << " c=" << c << " error " << worst);
}

CATAPULT_TEST(ntk_gram_cross_adds) {
  for_each_simd_level([] {
    check_cross<float>(1, 7, 1, 1);
    check_cross<float>(62, 5, 2, 1);
    check_cross<double>(13, 130, 1, 2);
    check_cross<double>(3, 2, 70, 1);
    check_cross<double>(257, 130, 2, 2);
  });
}

CATAPULT_TEST(ntk_gram_reports_non_finite) {
  for_each_simd_level([] {
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Layer<float> layer(63, 1, 20, 9, 1.0, 0.0, 7);
      layer.b[62 * (9 + 5) + 8] = bad;
      const GramTerm term = layer.term();
      std::vector<float> kernel(63 * 63);
      EXPECT(!ntk_gram({DType::kFloat32, 63, 1, &term, 1, kernel.data(), 63, false, 1}), "");
    }
  });
}

CATAPULT_TEST(ntk_gram_same_bits_for_any_thread_count) {
  for_each_simd_level([] {
    const Layer<float> layer(150, 1, 500, 300, 1.0, 0.5, 9);
    const GramTerm term = layer.term();
    std::vector<float> one(150 * 150), many(150 * 150);
    ntk_gram({DType::kFloat32, 150, 1, &term, 1, one.data(), 150, false, 1});
    for (int threads : {2, 5}) {
      ntk_gram({DType::kFloat32, 150, 1, &term, 1, many.data(), 150, false, threads});
      EXPECT(one == many, threads << " threads");
    }
  });
}

CATAPULT_TEST(ntk_gram_products_outside_the_range_of_float) {
  for_each_simd_level([] {
    Layer<float> layer(12, 1, 20, 9, 1.0, 0.0, 11);
    for (float& x : layer.a) x *= 1e-20f;
    for (float& x : layer.b) x *= 1e20f;
    const GramTerm term = layer.term();
    std::vector<float> kernel(12 * 12);
    EXPECT(ntk_gram({DType::kFloat32, 12, 1, &term, 1, kernel.data(), 12, false, 1}), "");
    for (int64_t i = 0; i < 12; ++i)
      for (int64_t j = 0; j < 12; ++j) {
        const double norm = std::sqrt(entry(layer, layer, i, i) * entry(layer, layer, j, j));
        EXPECT(std::fabs(kernel[i * 12 + j] - entry(layer, layer, i, j)) <= 2e-6 * norm, i << ", " << j);
      }
  });
}

}  // namespace
}  // namespace catapult::tests
