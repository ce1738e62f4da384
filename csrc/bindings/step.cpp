// The small parts of a training step: residual, parameter update, what must be as it was found.
#include <cstring>
#include <vector>

#include "bindings/bindings.h"
#include "core/check.h"
#include "core/rank_update.h"
#include "core/residual.h"

namespace py = pybind11;

namespace catapult::bindings {

namespace {

// Integers of an update: rows, height, width, left, left_stride, left_step, right, right_stride, weight,
// weight_stride, matrix, matrix_stride.
constexpr std::size_t kFields = 12;

}  // namespace

void bind_step(py::module_& module) {
  module.def(
      "same_bytes",
      [](std::uintptr_t left, std::uintptr_t right, std::size_t count) {
        return std::memcmp(pointer(left), pointer(right), count) == 0;
      },
      py::arg("left"), py::arg("right"), py::arg("count"),
      "Whether `count` bytes at two addresses are equal.");
  module.def(
      "residual",
      [](int dtype, int64_t count, std::uintptr_t prediction, std::uintptr_t target, std::uintptr_t result) {
        return residual(
            {static_cast<DType>(dtype), count, pointer(prediction), pointer(target), pointer(result)});
      },
      py::arg("dtype"), py::arg("count"), py::arg("prediction"), py::arg("target"), py::arg("residual"),
      "residual = prediction - target; the sum of its squares.");
  module.def(
      "rank_updates",
      [](int dtype, const py::list& fields, const py::sequence& scale, int threads) {
        const std::size_t count = scale.size();
        CATAPULT_CHECK(fields.size() == kFields * count,
                       "_C.rank_updates: expected " << kFields * count << " integers, got " << fields.size());
        std::vector<RankUpdate> updates(count);
        for (std::size_t u = 0; u < count; ++u) {
          int64_t v[kFields];
          read_integers(fields, u * kFields, v, kFields);
          const auto at = [&v](std::size_t f) { return pointer(static_cast<std::uintptr_t>(v[f])); };
          updates[u] = {
              static_cast<DType>(dtype),  v[0],   v[1],  v[2], at(3), v[4], at(6), v[7], at(8), v[9],
              py::cast<double>(scale[u]), at(10), v[11], v[5]};
        }
        py::gil_scoped_release release;
        rank_updates(updates.data(), static_cast<int64_t>(count), threads);
      },
      py::arg("dtype"), py::arg("fields"), py::arg("scale"), py::arg("threads"),
      "W += scale L^T diag(w) R for each twelve integers: rows, height, width, left or 0, strides of its "
      "rows "
      "and columns, right, its stride, weight or 0, its stride, matrix, its stride.");
}

}  // namespace catapult::bindings
