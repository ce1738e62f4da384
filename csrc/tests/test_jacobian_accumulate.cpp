#include "core/jacobian_accumulate.h"
#include "test.h"

namespace catapult::tests {
namespace {

template <typename T>
void check(int64_t rows, int64_t cols, bool with_grad, int threads) {
  const int64_t stride = cols + 7;
  const std::vector<T> tile = normal<T>(rows * stride, 1), weight = normal<T>(rows, 2);
  std::vector<T> kernel(rows * rows), grad = normal<T>(cols, 3);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j) kernel[i * rows + j] = T(i + j);
  const std::vector<T> old_grad = grad;
  const double scale = 0.7;
  EXPECT(jacobian_accumulate({dtype_of<T>(), rows, cols, tile.data(), stride, kernel.data(), rows,
                              with_grad ? weight.data() : nullptr, with_grad ? grad.data() : nullptr, threads,
                              scale}),
         rows << " x " << cols);
  std::vector<double> exact(rows * rows);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t k = 0; k < cols; ++k)
        exact[i * rows + j] += scale * scale * double(tile[i * stride + k]) * double(tile[j * stride + k]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < rows; ++j) {
      const double norm = std::sqrt(exact[i * rows + i] * exact[j * rows + j]) + double(i + j);
      const double error = std::fabs(double(kernel[i * rows + j]) - double(i + j) - exact[i * rows + j]);
      EXPECT(error <= gram_bound<T>() * norm,
             rows << " x " << cols << " at " << i << ", " << j << ": " << error);
      EXPECT(kernel[i * rows + j] == kernel[j * rows + i], i << ", " << j);
    }
  for (int64_t k = 0; k < cols; ++k) {
    double sum = old_grad[k], size = std::fabs(old_grad[k]);
    for (int64_t i = 0; with_grad && i < rows; ++i) {
      const double product = scale * double(weight[i]) * double(tile[i * stride + k]);
      sum += product;
      size += std::fabs(product);
    }
    EXPECT(std::fabs(double(grad[k]) - sum) <= gram_bound<T>() * size,
           rows << " x " << cols << " grad " << k);
  }
}

CATAPULT_TEST(jacobian_accumulate_kernel_and_gradient) {
  for_each_simd_level([] {
    for (int64_t rows : {0, 1, 2, 5, 33, 61})
      for (int64_t cols : {0, 1, 15, 2049})
        for (bool with_grad : {false, true}) {
          check<float>(rows, cols, with_grad, 1);
          check<double>(rows, cols, with_grad, 1);
        }
    check<float>(64, 5000, true, 3);
  });
}

CATAPULT_TEST(jacobian_accumulate_reports_non_finite) {
  for_each_simd_level([] {
    std::vector<float> tile = normal<float>(6 * 30, 4), kernel(36), grad(30), weight(6, 1.0f);
    weight[3] = std::numeric_limits<float>::infinity();
    EXPECT(
        jacobian_accumulate({DType::kFloat32, 6, 30, tile.data(), 30, kernel.data(), 6, nullptr, nullptr, 1}),
        "");
    EXPECT(!jacobian_accumulate(
               {DType::kFloat32, 6, 30, tile.data(), 30, kernel.data(), 6, weight.data(), grad.data(), 1}),
           "in the gradient");
    tile[100] = std::numeric_limits<float>::quiet_NaN();
    EXPECT(!jacobian_accumulate(
               {DType::kFloat32, 6, 30, tile.data(), 30, kernel.data(), 6, nullptr, nullptr, 1}),
           "in the kernel");
  });
}

}  // namespace
}  // namespace catapult::tests
