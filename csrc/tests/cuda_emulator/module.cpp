// The bindings of csrc/bindings/cuda.cpp over the emulator: "device" addresses are host addresses.
#include <cuda_runtime.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace catapult::cuda {
void bind_tile_sums(py::module_& module);  // tile_sums.cpp
}

PYBIND11_MODULE(_cuda_emulated, module) {
  catapult::bindings::bind_cuda(module);
  catapult::cuda::bind_tile_sums(module);
  module.def(
      "emulator_configure",
      [](uint64_t shuffle_seed, int shared_limit, int devices, int capability) {
        emulator::options() = {shuffle_seed, shared_limit, devices, capability};
      },
      py::arg("shuffle_seed") = 0, py::arg("shared_limit") = 227 * 1024, py::arg("devices") = 1,
      py::arg("capability") = 9);
  module.def("emulator_launches", [] { return emulator::launches(); });
}
