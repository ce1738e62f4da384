#include "core/agop_reduce.h"
#include "test.h"

namespace catapult::tests {
namespace {

template <typename T>
void check(int64_t rows, int64_t d, int threads) {
  const int64_t stride = d + 1;
  const std::vector<T> g = normal<T>(rows * stride, 1);
  std::vector<T> agop(d * d, T(2));
  EXPECT(agop_reduce({dtype_of<T>(), rows, d, g.data(), stride, 0.25, agop.data(), d, threads}),
         rows << " x " << d);
  std::vector<double> exact(d * d);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j)
        exact[i * d + j] += 0.25 * double(g[r * stride + i]) * double(g[r * stride + j]);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      const double norm = std::sqrt(exact[i * d + i] * exact[j * d + j]) + 2;
      EXPECT(std::fabs(double(agop[i * d + j]) - 2 - exact[i * d + j]) <= gram_bound<T>() * norm,
             rows << " x " << d << " at " << i << ", " << j);
      EXPECT(agop[i * d + j] == agop[j * d + i], i << ", " << j);
    }
}

CATAPULT_TEST(agop_reduce_adds) {
  for_each_simd_level([] {
    for (int64_t rows : {0, 1, 31, 300})
      for (int64_t d : {0, 1, 2, 33, 129}) {
        check<float>(rows, d, 1);
        check<double>(rows, d, 1);
      }
    check<float>(400, 150, 3);
  });
}

CATAPULT_TEST(agop_inner_is_a_sum_of_squares) {
  for_each_simd_level([] {
    for (int64_t rows : {1, 5, 130}) {
      const int64_t others = 67, d = 45;
      const std::vector<double> g = normal<double>(rows * d, 2), h = normal<double>(others * d, 3);
      double exact = 0;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < others; ++j) {
          double product = 0;
          for (int64_t k = 0; k < d; ++k) product += g[i * d + k] * h[j * d + k];
          exact += product * product;
        }
      double first = 0;
      for (int threads : {1, 2, 4}) {
        const double got = agop_inner({DType::kFloat64, rows, others, d, g.data(), d, h.data(), d, threads});
        EXPECT(std::fabs(got - exact) <= 1e-13 * exact, rows << " rows: " << got << ", expected " << exact);
        if (threads == 1) first = got;
        EXPECT(got == first, threads << " threads");
      }
    }
  });
}

}  // namespace
}  // namespace catapult::tests
