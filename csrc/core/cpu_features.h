#pragma once

#include <string>
#include <vector>

namespace catapult {

enum class SimdLevel : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

const char* simd_name(SimdLevel level);

// Levels that are compiled in and that this processor can run, lowest first.
std::vector<SimdLevel> available_simd_levels();

// The level in use: the highest available one, or what CATAPULT_SIMD (scalar | avx2 | avx512) or
// set_simd_level asked for. Asking for a level that is not available throws std::invalid_argument.
SimdLevel simd_level();
void set_simd_level(const std::string& name);

}  // namespace catapult
