#include "bindings/bindings.h"
#include "core/check.h"
#include "core/cpu_features.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  using namespace catapult;
  module.doc() = "Compiled kernels of catapult_ext. Use catapult_ext.ops; this module trusts its arguments.";
  py::register_exception<InternalError>(module, "InternalError", PyExc_RuntimeError);

  bindings::bind_ntk_gram(module);
  bindings::bind_jacobian_accumulate(module);
  bindings::bind_agop_reduce(module);
  bindings::bind_topk_eigh(module);
  bindings::bind_step(module);
  bindings::bind_chain_sgd(module);
#if defined(CATAPULT_HAVE_CUDA)
  bindings::bind_cuda(module);
#endif

  module.def("simd_level", [] { return std::string(simd_name(simd_level())); });
  module.def("set_simd_level", &set_simd_level, py::arg("name"));
  module.def("available_simd_levels", [] {
    std::vector<std::string> names;
    for (SimdLevel level : available_simd_levels()) names.emplace_back(simd_name(level));
    return names;
  });
  module.def("compile_info", [] {
    py::dict info;
    info["compiler"] = CATAPULT_COMPILER;
    info["version"] = CATAPULT_VERSION;
    info["cuda_archs"] = CATAPULT_CUDA_ARCHS;
    info["cuda_version"] = CATAPULT_CUDA_VERSION;
    return info;
  });
}
