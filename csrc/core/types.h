// Letters used everywhere: n samples, c outputs, p parameters, d input features, k eigenpairs,
// b batch. A kernel row has index i * c + j (sample-major): sample i, output j.
#pragma once

#include <cstdint>

namespace catapult {

enum class DType : int { kFloat32 = 0, kFloat64 = 1 };

}  // namespace catapult
