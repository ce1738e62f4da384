// The tensor cores of the emulator.
#include <cuda_runtime.h>

#include <limits>

namespace emulator {

namespace {

// What a lane gives: elements of A [16, 8] and B [8, 8].
template <typename T>
struct Fragments {
  T a[4], b[2];
};

// Element i of the running lane's D: row `i / 2 * 8 + lane / 4`, column `lane % 4 * 2 + i % 2`. Calls
// add(A[row, k], B[k, column]) for every k.
template <typename T, typename Add>
void for_products(const Lane* lanes, int i, const Add& add) {
  const unsigned lane = thread_index() % 32, column = lane % 4 * 2 + i % 2;
  for (unsigned k = 0; k < 8; ++k) {
    const auto* a = reinterpret_cast<const Fragments<T>*>(lanes[lane / 4 * 4 + k % 4].bytes);
    const auto* b = reinterpret_cast<const Fragments<T>*>(lanes[column * 4 + k % 4].bytes);
    add(a->a[k / 4 * 2 + i / 2], b->b[k / 4]);
  }
}

double tf32(uint32_t bits) { return static_cast<double>(__uint_as_float(bits & 0xffffe000u)); }

float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  if (std::isinf(nearest) && std::isfinite(value))
    return std::copysign(std::numeric_limits<float>::max(), nearest);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  const Fragments<uint32_t> mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Lane* lanes = warp_gather(&mine, sizeof(mine));
  for (int i = 0; i < 4; ++i) {
    double sum = static_cast<double>(c[i]);
    for_products<uint32_t>(lanes, i, [&sum](uint32_t x, uint32_t y) { sum += tf32(x) * tf32(y); });
    d[i] = toward_zero(sum);
  }
}

void mma_f64(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
  const Fragments<double> mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Lane* lanes = warp_gather(&mine, sizeof(mine));
  for (int i = 0; i < 4; ++i)
    for_products<double>(lanes, i, [&](double x, double y) { d[i] = std::fma(x, y, d[i]); });
}

}  // namespace emulator
