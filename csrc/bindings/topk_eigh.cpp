#include "core/topk_eigh.h"

#include <vector>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace catapult::bindings {

namespace {

// Nothing where every matrix converged, else the status of each: no tensor for what is nearly always zeros.
std::vector<int> failures(const std::vector<int8_t>& status) {
  for (int8_t one : status)
    if (one != 0) return {status.begin(), status.end()};
  return {};
}

}  // namespace

void bind_topk_eigh(py::module_& module) {
  module.def(
      "topk_eigh",
      [](int dtype, int64_t batch, int64_t n, int64_t k, std::uintptr_t kernel, int64_t kernel_batch_stride,
         int64_t kernel_stride, std::uintptr_t start, int64_t start_cols, double tol, int method,
         std::uintptr_t values, std::uintptr_t vectors, std::uintptr_t residuals, int threads) {
        py::gil_scoped_release unlocked;
        std::vector<int8_t> status(batch);
        topk_eigh({static_cast<DType>(dtype), batch, n, k, pointer(kernel), kernel_batch_stride,
                   kernel_stride, pointer(start), start_cols, tol, static_cast<EighMethod>(method),
                   pointer(values), pointer(vectors), pointer(residuals), status.data(), threads});
        return failures(status);
      },
      py::arg("dtype"), py::arg("batch"), py::arg("n"), py::arg("k"), py::arg("kernel"),
      py::arg("kernel_batch_stride"), py::arg("kernel_stride"), py::arg("start"), py::arg("start_cols"),
      py::arg("tol"), py::arg("method"), py::arg("values"), py::arg("vectors"), py::arg("residuals"),
      py::arg("threads"));

  module.def(
      "spectral_norm",
      [](int dtype, int64_t batch, int64_t n, std::uintptr_t kernel, int64_t kernel_batch_stride,
         int64_t kernel_stride, double tol, std::uintptr_t values, int threads) {
        py::gil_scoped_release unlocked;
        std::vector<int8_t> status(batch);
        spectral_norm({static_cast<DType>(dtype), batch, n, pointer(kernel), kernel_batch_stride,
                       kernel_stride, tol, pointer(values), status.data(), threads});
        return failures(status);
      },
      py::arg("dtype"), py::arg("batch"), py::arg("n"), py::arg("kernel"), py::arg("kernel_batch_stride"),
      py::arg("kernel_stride"), py::arg("tol"), py::arg("values"), py::arg("threads"));
}

}  // namespace catapult::bindings
