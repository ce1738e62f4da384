#include "core/jacobian_accumulate.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace catapult::bindings {

void bind_jacobian_accumulate(py::module_& module) {
  module.def(
      "jacobian_accumulate",
      [](int dtype, int64_t rows, int64_t cols, std::uintptr_t tile, int64_t tile_stride,
         std::uintptr_t kernel, int64_t kernel_stride, std::uintptr_t weight, std::uintptr_t grad,
         double scale, int threads) {
        const JacobianAccumulate problem{static_cast<DType>(dtype),
                                         rows,
                                         cols,
                                         pointer(tile),
                                         tile_stride,
                                         pointer(kernel),
                                         kernel_stride,
                                         pointer(weight),
                                         pointer(grad),
                                         threads,
                                         scale};
        py::gil_scoped_release release;
        return jacobian_accumulate(problem);
      },
      py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("tile"), py::arg("tile_stride"),
      py::arg("kernel"), py::arg("kernel_stride"), py::arg("weight"), py::arg("grad"), py::arg("scale"),
      py::arg("threads"),
      "K += scale^2 G G^T and, where weight is not 0, grad += scale G^T w. False: a NaN or an infinity was "
      "written.");
}

}  // namespace catapult::bindings
