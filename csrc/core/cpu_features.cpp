#include "core/cpu_features.h"

#include <atomic>
#include <cstdlib>

#include "core/check.h"

namespace catapult {

namespace {

bool runs_here(SimdLevel level) {
  if (level == SimdLevel::kScalar) return true;
#if defined(CATAPULT_HAVE_X86)
  if (level == SimdLevel::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#else
  return false;
#endif
}

SimdLevel parse(const std::string& name) {
  for (SimdLevel level : available_simd_levels())
    if (name == simd_name(level)) return level;
  std::string known;
  for (SimdLevel level : available_simd_levels())
    known += std::string(known.empty() ? "" : ", ") + simd_name(level);
  CATAPULT_CHECK(false, "CATAPULT_SIMD: expected one of " << known << " (what this build and this "
                                                          << "processor offer), got '" << name << "'");
}

SimdLevel initial_level() {
  const char* forced = std::getenv("CATAPULT_SIMD");
  if (forced != nullptr && *forced != '\0') return parse(forced);
  return available_simd_levels().back();
}

std::atomic<int>& current_level() {
  static std::atomic<int> level{static_cast<int>(initial_level())};
  return level;
}

}  // namespace

const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx2: return "avx2";
    case SimdLevel::kAvx512: return "avx512";
    default: return "scalar";
  }
}

std::vector<SimdLevel> available_simd_levels() {
  std::vector<SimdLevel> levels;
  for (SimdLevel level : {SimdLevel::kScalar, SimdLevel::kAvx2, SimdLevel::kAvx512})
    if (runs_here(level)) levels.push_back(level);
  return levels;
}

SimdLevel simd_level() { return static_cast<SimdLevel>(current_level().load()); }

void set_simd_level(const std::string& name) { current_level().store(static_cast<int>(parse(name))); }

}  // namespace catapult
