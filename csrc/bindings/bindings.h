// Unpack integers, drop the GIL, call, map exceptions. No mathematics and no torch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "core/types.h"

namespace catapult::bindings {

// Tensors arrive as the integers of data_ptr(); the Python side has checked shape and dtype.
inline void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

// `count` integers of a list from position `first` on, read directly: these calls stand on the path of every
// small training step.
inline void read_integers(const pybind11::list& fields, std::size_t first, int64_t* values,
                          std::size_t count) {
  for (std::size_t f = 0; f < count; ++f)
    values[f] = PyLong_AsLongLong(PyList_GET_ITEM(fields.ptr(), static_cast<Py_ssize_t>(first + f)));
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
}

void bind_ntk_gram(pybind11::module_& module);
void bind_jacobian_accumulate(pybind11::module_& module);
void bind_agop_reduce(pybind11::module_& module);
void bind_topk_eigh(pybind11::module_& module);
void bind_step(pybind11::module_& module);
void bind_chain_sgd(pybind11::module_& module);
#if defined(CATAPULT_HAVE_CUDA)
void bind_cuda(pybind11::module_& module);
#endif

}  // namespace catapult::bindings
