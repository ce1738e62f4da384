// The tensor cores of the emulator.
#include <cuda_runtime.h>

#include <limits>

namespace emulator {

namespace {

// Operands of one lane, and what all of them make: A [16, 8], B [8, 8].
template <typename T>
struct Fragments {
  T a[4], b[2];
};

template <typename T>
struct Matrices {
  T a[16][8], b[8][8];

  explicit Matrices(const Fragments<T>& mine) {
    static_assert(sizeof(mine) <= kLaneBytes, "one lane's share");
    Fragments<T> all[32];
    warp_gather(&mine, sizeof(mine), all);
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, place = lane % 4;
      for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][place + i / 2 * 4] = all[lane].a[i];
      for (int i = 0; i < 2; ++i) b[place + i * 4][group] = all[lane].b[i];
    }
  }
};

// Row and column of D that element i of a lane's fragment is.
int row(int i) { return static_cast<int>(thread_index() % 32 / 4) + i / 2 * 8; }
int column(int i) { return static_cast<int>(thread_index() % 4) * 2 + i % 2; }

double tf32(uint32_t bits) { return static_cast<double>(__uint_as_float(bits & 0xffffe000u)); }

float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  if (std::isinf(nearest) && std::isfinite(value))
    return std::copysign(std::numeric_limits<float>::max(), nearest);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  const Matrices<uint32_t> all({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  float result[4];
  for (int i = 0; i < 4; ++i) {
    double sum = static_cast<double>(c[i]);
    for (int k = 0; k < 8; ++k) sum += tf32(all.a[row(i)][k]) * tf32(all.b[k][column(i)]);
    result[i] = toward_zero(sum);
  }
  std::memcpy(d, result, sizeof(result));  // d may be c
}

void mma_f64(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
  const Matrices<double> all({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 8; ++k) d[i] = std::fma(all.a[row(i)][k], all.b[k][column(i)], d[i]);
}

}  // namespace emulator
