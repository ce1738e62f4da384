#include "core/rank_update.h"
#include "core/residual.h"
#include "test.h"

namespace catapult::tests {
namespace {

template <typename T>
void check_update(int64_t rows, int64_t height, int64_t width, bool left_given, bool weighted, int threads,
                  bool zeros = false, bool transposed = false) {
  const int64_t left_stride = transposed ? 1 : height + 2, left_step = transposed ? rows + 1 : 1;
  const int64_t right_stride = width + 1, stride = width + 3;
  std::vector<T> left = normal<T>((rows + 1) * (height + 2), 1);
  const std::vector<T> right = normal<T>(rows * right_stride, 2);
  for (T& value : left)
    if (zeros && value < T(0)) value = T(0);
  const std::vector<T> weight = normal<T>(2 * rows, 3), before = normal<T>(height * stride, 4);
  std::vector<T> after = before;
  const RankUpdate update{dtype_of<T>(),
                          rows,
                          height,
                          width,
                          left_given ? left.data() : nullptr,
                          left_stride,
                          right.data(),
                          right_stride,
                          weighted ? weight.data() : nullptr,
                          2,
                          -0.3,
                          after.data(),
                          stride,
                          left_step};
  rank_updates(&update, 1, threads);
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < stride; ++j) {
      double exact = before[i * stride + j], size = std::fabs(exact);
      for (int64_t r = 0; r < rows && j < width; ++r) {
        const double part = -0.3 * (left_given ? double(left[r * left_stride + i * left_step]) : 1.0) *
                            double(right[r * right_stride + j]) * (weighted ? double(weight[2 * r]) : 1.0);
        exact += part;
        size += std::fabs(part);
      }
      const double error = std::fabs(double(after[i * stride + j]) - exact);
      EXPECT(j < width ? error <= 8 * std::numeric_limits<T>::epsilon() * size : error == 0,
             rows << " x " << height << " x " << width << " at " << i << ", " << j << ": off by " << error);
    }
}

CATAPULT_TEST(rank_updates_add_a_product_and_touch_nothing_else) {
  for_each_simd_level([] {
    for (int64_t rows : {0, 1, 5, 32, 130, 257})
      for (int64_t height : {1, 7, 8, 33})
        for (int64_t width : {1, 15, 16, 49, 100}) {
          check_update<float>(rows, height, width, true, true, 1);
          check_update<double>(rows, height, width, true, false, 1);
          if (height == 1) check_update<float>(rows, height, width, false, true, 1);
        }
    check_update<float>(64, 301, 257, true, true, 3);
    for (bool zeros : {false, true})
      for (bool transposed : {false, true}) {
        check_update<float>(333, 19, 1029, true, true, 1, zeros, transposed);
        check_update<double>(65, 261, 517, true, true, 2, zeros, transposed);
        check_update<float>(513, 270, 65, true, false, 2, zeros, transposed);
      }
  });
}

CATAPULT_TEST(rank_updates_do_not_depend_on_threads) {
  for_each_simd_level([] {
    const int64_t rows = 33, height = 205, width = 301;
    const std::vector<float> left = normal<float>(rows * height, 1), right = normal<float>(rows * width, 2);
    std::vector<float> first;
    for (int threads : {1, 2, 5}) {
      std::vector<float> matrix = normal<float>(height * width, 3);
      const RankUpdate update{DType::kFloat32, rows,    height, width, left.data(),   height, right.data(),
                              width,           nullptr, 0,      0.7,   matrix.data(), width};
      rank_updates(&update, 1, threads);
      if (threads == 1) first = matrix;
      EXPECT(matrix == first, threads << " threads");
    }
  });
}

CATAPULT_TEST(residual_is_a_difference_with_its_squares) {
  for_each_simd_level([] {
    for (int64_t count : {0, 1, 5, 1000}) {
      const std::vector<float> f = normal<float>(count, 1), y = normal<float>(count, 2);
      std::vector<float> r(count, std::numeric_limits<float>::quiet_NaN());
      const double squares = residual({DType::kFloat32, count, f.data(), y.data(), r.data()});
      double exact = 0;
      for (int64_t i = 0; i < count; ++i) {
        EXPECT(r[i] == f[i] - y[i], count << " at " << i);
        exact += double(r[i]) * double(r[i]);
      }
      EXPECT(std::fabs(squares - exact) <= 1e-14 * exact, count << ": " << squares << ", expected " << exact);
    }
  });
}

}  // namespace
}  // namespace catapult::tests
