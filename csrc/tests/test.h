// A test is CATAPULT_TEST(name) { ... }, a check EXPECT(condition, text to print when it fails). Tests
// register themselves; main.cpp runs them all and fails when one did, or when there is none.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "core/types.h"

namespace catapult::tests {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { registry().push_back({name, run}); }
};

// --- what the tests of several kernels share ---

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
}

// Bound of |dK_ij| / sqrt(K_ii K_jj).
template <typename T>
constexpr double gram_bound() {
  return sizeof(T) == 8 ? 1e-13 : 2e-6;
}

template <typename T>
std::vector<T> normal(int64_t count, unsigned seed) {
  std::mt19937_64 source(seed);
  std::normal_distribution<double> distribution;
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(distribution(source));
  return values;
}

// A result that no kernel has written yet.
template <typename T>
std::vector<T> poison(int64_t count) {
  return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN());
}

// Calls body() once per instruction set of this processor, and names it should a check fail.
std::string& context();

template <typename Body>
void for_each_simd_level(const Body& body) {
  const SimdLevel before = simd_level();
  for (SimdLevel level : available_simd_levels()) {
    set_simd_level(simd_name(level));
    context() = simd_name(level);
    body();
  }
  set_simd_level(simd_name(before));
  context().clear();
}

}  // namespace catapult::tests

#define CATAPULT_TEST(name)                                                                        \
  static void catapult_test_##name();                                                              \
  static const ::catapult::tests::Register catapult_register_##name{#name, &catapult_test_##name}; \
  static void catapult_test_##name()

#define EXPECT(condition, text)                                                          \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::ostringstream catapult_text;                                                  \
      catapult_text << text;                                                             \
      std::printf("  %s:%d: %s does not hold [%s] %s\n", __FILE__, __LINE__, #condition, \
                  ::catapult::tests::context().c_str(), catapult_text.str().c_str());    \
      ++::catapult::tests::failures();                                                   \
    }                                                                                    \
  } while (0)
