#include "core/chain_sgd.h"

#include <vector>

#include "bindings/bindings.h"
#include "core/check.h"

namespace py = pybind11;

namespace catapult::bindings {

namespace {

// Integers of a layer: in, out, weight, weight_stride, bias or 0, whether the weight and the bias are
// trained.
constexpr std::size_t kFields = 7;
// Numbers of a layer: weight_scale, bias_scale, slope.
constexpr std::size_t kNumbers = 3;

}  // namespace

void bind_chain_sgd(py::module_& module) {
  module.def(
      "chain_sgd",
      [](int dtype, const py::list& fields, const std::vector<double>& numbers, std::uintptr_t x,
         int64_t x_stride, std::uintptr_t y, int64_t y_stride, std::uintptr_t batch_index,
         std::uintptr_t batch_sizes, std::uintptr_t rates, std::uintptr_t observed, int64_t steps,
         double loss_limit, double tol, std::uintptr_t losses, std::uintptr_t lambda_1) {
        const std::size_t count = fields.size() / kFields;
        CATAPULT_CHECK(count > 0 && fields.size() == kFields * count && numbers.size() == kNumbers * count,
                       "_C.chain_sgd: expected " << kFields << " integers and " << kNumbers
                                                 << " numbers for each layer, got " << fields.size()
                                                 << " and " << numbers.size());
        std::vector<ChainLayer> layers(count);
        for (std::size_t l = 0; l < count; ++l) {
          int64_t v[kFields];
          read_integers(fields, l * kFields, v, kFields);
          const double* number = numbers.data() + l * kNumbers;
          const auto at = [&v](std::size_t f) { return pointer(static_cast<std::uintptr_t>(v[f])); };
          layers[l] = {v[0], v[1], at(2), v[3], number[0], at(4), number[1], v[5] != 0, v[6] != 0, number[2]};
        }
        const ChainSgd problem{static_cast<DType>(dtype),
                               layers.data(),
                               static_cast<int64_t>(count),
                               pointer(x),
                               x_stride,
                               pointer(y),
                               y_stride,
                               static_cast<const int64_t*>(pointer(batch_index)),
                               static_cast<const int64_t*>(pointer(batch_sizes)),
                               static_cast<const double*>(pointer(rates)),
                               static_cast<const uint8_t*>(pointer(observed)),
                               steps,
                               loss_limit,
                               tol,
                               pointer(losses),
                               pointer(lambda_1)};
        py::gil_scoped_release release;
        return chain_sgd(problem);
      },
      py::arg("dtype"), py::arg("fields"), py::arg("numbers"), py::arg("x"), py::arg("x_stride"),
      py::arg("y"), py::arg("y_stride"), py::arg("batch_index"), py::arg("batch_sizes"), py::arg("rates"),
      py::arg("observed"), py::arg("steps"), py::arg("loss_limit"), py::arg("tol"), py::arg("losses"),
      py::arg("lambda_1"),
      "SGD steps on a chain of Linear layers. For each layer seven integers: in, out, weight, its stride, "
      "bias "
      "or 0, whether weight and bias are trained; and three numbers: weight scale, bias scale, slope. "
      "Returns "
      "how many steps were made.");
}

}  // namespace catapult::bindings
