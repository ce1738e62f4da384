#include "core/topk_eigh.h"
#include "test.h"

namespace catapult::tests {
namespace {

template <typename T>
constexpr double eigen_bound() {
  return sizeof(T) == 8 ? 1e-12 : 1e-6;
}

// Lower triangle of Q diag(values) Q^T for a product Q of reflections; NaN above the diagonal.
template <typename T>
std::vector<T> with_spectrum(const std::vector<double>& values, int64_t stride) {
  const int64_t n = static_cast<int64_t>(values.size());
  std::vector<double> full(n * n);
  for (int64_t i = 0; i < n; ++i) full[i * n + i] = values[i];
  for (unsigned seed : {1u, 2u, 3u}) {
    const std::vector<double> u = normal<double>(n, seed);
    double square = 0;
    for (double x : u) square += x * x;
    const double factor = 2 / square;
    for (int side = 0; side < 2; ++side)  // H A, then (H A) H
      for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += u[j] * (side == 0 ? full[j * n + i] : full[i * n + j]);
        for (int64_t j = 0; j < n; ++j)
          (side == 0 ? full[j * n + i] : full[i * n + j]) -= factor * sum * u[j];
      }
  }
  std::vector<T> matrix = poison<T>(n * stride);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) matrix[i * stride + j] = static_cast<T>(full[i * n + j]);
  return matrix;
}

template <typename T>
void check(const std::vector<double>& spectrum, int64_t k, EighMethod method, int threads) {
  const int64_t n = static_cast<int64_t>(spectrum.size()), stride = n + 3;
  const std::vector<T> matrix = with_spectrum<T>(spectrum, stride);
  std::vector<T> values = poison<T>(k), vectors = poison<T>(n * k), residuals = poison<T>(k);
  int8_t status = -1;
  topk_eigh({dtype_of<T>(), 1, n, k, matrix.data(), n * stride, stride, nullptr, 0, eigen_bound<T>(), method,
             values.data(), vectors.data(), residuals.data(), &status, threads});
  EXPECT(status == 0, n << ", k = " << k << ": status " << int(status));
  const double bound = eigen_bound<T>();
  for (int64_t a = 0; a < k; ++a) {
    EXPECT(std::fabs(double(values[a]) - spectrum[a]) <= bound, values[a] << ", expected " << spectrum[a]);
    EXPECT(double(residuals[a]) <= 1.2 * bound, "residual " << residuals[a]);
    for (int64_t b = 0; b <= a; ++b) {
      double product = 0;
      for (int64_t i = 0; i < n; ++i) product += double(vectors[i * k + a]) * double(vectors[i * k + b]);
      EXPECT(std::fabs(product - (a == b)) <= bound, n << ": <v" << a << ", v" << b << "> = " << product);
    }
    double square = 0;
    for (int64_t i = 0; i < n; ++i) {
      double r = -double(values[a]) * double(vectors[i * k + a]);
      for (int64_t j = 0; j < n; ++j)
        r += double(matrix[i >= j ? i * stride + j : j * stride + i]) * double(vectors[j * k + a]);
      square += r * r;
    }
    EXPECT(std::sqrt(square) <= 1.2 * bound, n << ": true residual " << std::sqrt(square));
  }
  T norm = std::numeric_limits<T>::quiet_NaN();
  spectral_norm({dtype_of<T>(), 1, n, matrix.data(), n * stride, stride, bound, &norm, &status, threads});
  EXPECT(status == 0 && std::fabs(double(norm) - spectrum[0]) <= bound, norm << ", expected " << spectrum[0]);
}

std::vector<double> decaying(int64_t n) {
  std::vector<double> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = 1.0 / double((i + 1) * (i + 1));
  return values;
}

std::vector<double> two_clusters(int64_t n) {
  std::vector<double> values(n, 0.25);
  for (int64_t i = 0; i < (n + 2) / 3; ++i) values[i] = 1;
  return values;
}

CATAPULT_TEST(topk_eigh_direct) {
  for_each_simd_level([] {
    for (int64_t n : {1, 2, 3, 7, 8, 9, 33, 64})
      for (int64_t k : {int64_t{1}, (n + 1) / 2, n}) {
        check<float>(decaying(n), k, EighMethod::kDirect, 1);
        check<double>(decaying(n), k, EighMethod::kDirect, 1);
        check<double>(two_clusters(n), k, EighMethod::kDirect, 1);
        check<double>(std::vector<double>(n, 0.0), k, EighMethod::kDirect, 1);
      }
  });
}

CATAPULT_TEST(topk_eigh_krylov) {
  for_each_simd_level([] {
    for (int64_t k : {1, 6}) {
      check<float>(decaying(203), k, EighMethod::kKrylov, 1);
      check<double>(decaying(203), k, EighMethod::kKrylov, 1);
      check<double>(two_clusters(129), k, EighMethod::kKrylov, 1);
    }
    check<double>(decaying(530), 3, EighMethod::kKrylov, 2);
  });
}

CATAPULT_TEST(topk_eigh_batches_are_shared_among_threads) {
  const int64_t batch = 23, n = 19, k = 2;  // whole groups of lanes at every level, and a rest
  std::vector<double> kernels;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> spectrum = decaying(n);
    spectrum[0] = 2.0 + double(b);
    const std::vector<double> one = with_spectrum<double>(spectrum, n);
    kernels.insert(kernels.end(), one.begin(), one.end());
  }
  std::vector<double> first;
  for (int threads : {1, 3, 16}) {
    std::vector<double> values = poison<double>(batch * k), vectors = poison<double>(batch * n * k);
    std::vector<double> residuals = poison<double>(batch * k), norms = poison<double>(batch);
    std::vector<int8_t> status(batch, -1);
    topk_eigh({DType::kFloat64, batch, n, k, kernels.data(), n * n, n, nullptr, 0, 1e-12, EighMethod::kAuto,
               values.data(), vectors.data(), residuals.data(), status.data(), threads});
    for (int64_t b = 0; b < batch; ++b)
      EXPECT(status[b] == 0 && std::fabs(values[b * k] - 2 - double(b)) <= 1e-12 * 25,
             b << ": " << values[b * k]);
    if (threads == 1) first = vectors;
    EXPECT(first == vectors, threads << " threads");
    spectral_norm(
        {DType::kFloat64, batch, n, kernels.data(), n * n, n, 1e-12, norms.data(), status.data(), threads});
    for (int64_t b = 0; b < batch; ++b)
      EXPECT(status[b] == 0 && std::fabs(norms[b] - 2 - double(b)) <= 1e-12 * 25, b << ": " << norms[b]);
  }
}

CATAPULT_TEST(topk_eigh_reports_what_is_not_finite) {
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    for (int64_t n : {1, 9, 300}) {
      std::vector<double> matrix = with_spectrum<double>(decaying(n), n);
      matrix[(n - 1) * n + n / 2] = bad;
      double value, residual, norm;
      std::vector<double> vector(n);
      for (EighMethod method : {EighMethod::kAuto, EighMethod::kDirect, EighMethod::kKrylov}) {
        if (n < 300 && method == EighMethod::kKrylov) continue;
        int8_t status = -1;
        topk_eigh({DType::kFloat64, 1, n, 1, matrix.data(), n * n, n, nullptr, 0, 1e-12, method, &value,
                   vector.data(), &residual, &status, 1});
        EXPECT(status == 2, n << ": status " << int(status));
      }
      int8_t status = -1;
      spectral_norm({DType::kFloat64, 1, n, matrix.data(), n * n, n, 1e-12, &norm, &status, 1});
      EXPECT(status == 2, n << ": status " << int(status));
    }
}

}  // namespace
}  // namespace catapult::tests
