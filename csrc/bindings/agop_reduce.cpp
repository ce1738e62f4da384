#include "core/agop_reduce.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace catapult::bindings {

void bind_agop_reduce(py::module_& module) {
  module.def(
      "agop_reduce",
      [](int dtype, int64_t rows, int64_t d, std::uintptr_t g, int64_t g_stride, double scale,
         std::uintptr_t agop, int64_t agop_stride, int threads) {
        const AgopReduce problem{static_cast<DType>(dtype),
                                 rows,
                                 d,
                                 pointer(g),
                                 g_stride,
                                 scale,
                                 pointer(agop),
                                 agop_stride,
                                 threads};
        py::gil_scoped_release release;
        return agop_reduce(problem);
      },
      py::arg("dtype"), py::arg("rows"), py::arg("d"), py::arg("g"), py::arg("g_stride"), py::arg("scale"),
      py::arg("agop"), py::arg("agop_stride"), py::arg("threads"),
      "agop += scale G^T G. False: a NaN or an infinity was written.");
  module.def(
      "agop_inner",
      [](int dtype, int64_t g_rows, int64_t h_rows, int64_t d, std::uintptr_t g, int64_t g_stride,
         std::uintptr_t h, int64_t h_stride, int threads) {
        const AgopInner problem{static_cast<DType>(dtype),
                                g_rows,
                                h_rows,
                                d,
                                pointer(g),
                                g_stride,
                                pointer(h),
                                h_stride,
                                threads};
        py::gil_scoped_release release;
        return agop_inner(problem);
      },
      py::arg("dtype"), py::arg("g_rows"), py::arg("h_rows"), py::arg("d"), py::arg("g"), py::arg("g_stride"),
      py::arg("h"), py::arg("h_stride"), py::arg("threads"), "||G H^T||_F^2, summed in double.");
}

}  // namespace catapult::bindings
