#include "core/ntk_gram.h"

#include <vector>

#include "bindings/bindings.h"
#include "core/check.h"

namespace py = pybind11;

namespace catapult::bindings {

namespace {

// Integers of a layer: a, a_stride, a_cols, b, b_stride, b_output_stride, b_cols.
constexpr std::size_t kFields = 7;

std::vector<GramTerm> read_terms(const py::list& fields, const py::sequence& scale,
                                 const py::sequence& beta) {
  const std::size_t count = scale.size();
  CATAPULT_CHECK(fields.size() == kFields * count && beta.size() == count,
                 "_C.ntk_gram: expected " << kFields * count << " integers and " << count << " betas, got "
                                          << fields.size() << " and " << beta.size());
  std::vector<GramTerm> terms(count);
  for (std::size_t l = 0; l < count; ++l) {
    int64_t values[kFields];
    read_integers(fields, l * kFields, values, kFields);
    terms[l] = {pointer(static_cast<std::uintptr_t>(values[0])),
                values[1],
                values[2],
                pointer(static_cast<std::uintptr_t>(values[3])),
                values[4],
                values[5],
                values[6],
                py::cast<double>(scale[l]),
                py::cast<double>(beta[l])};
  }
  return terms;
}

}  // namespace

void bind_ntk_gram(py::module_& module) {
  module.def(
      "ntk_gram",
      [](int dtype, int64_t n, int64_t c, const py::list& terms, const py::sequence& scale,
         const py::sequence& beta, std::uintptr_t kernel, int64_t kernel_stride, bool accumulate,
         int threads) {
        const std::vector<GramTerm> layers = read_terms(terms, scale, beta);
        const NtkGram problem{static_cast<DType>(dtype),
                              n,
                              c,
                              layers.data(),
                              static_cast<int64_t>(layers.size()),
                              pointer(kernel),
                              kernel_stride,
                              accumulate,
                              threads};
        py::gil_scoped_release release;
        return ntk_gram(problem);
      },
      py::arg("dtype"), py::arg("n"), py::arg("c"), py::arg("terms"), py::arg("scale"), py::arg("beta"),
      py::arg("kernel"), py::arg("kernel_stride"), py::arg("accumulate"), py::arg("threads"),
      "K (+)= sum_l scale_l (A A^T + beta_l) * (B B^T). Per layer, terms holds a, a_stride, a_cols, b, "
      "b_stride, "
      "b_output_stride, b_cols. False: a NaN or an infinity was written.");
  module.def(
      "ntk_gram_cross",
      [](int dtype, int64_t n, int64_t m, int64_t c, const py::list& x_terms, const py::list& z_terms,
         const py::sequence& scale, const py::sequence& beta, std::uintptr_t kernel, int64_t kernel_stride,
         bool accumulate, int threads) {
        const std::vector<GramTerm> x = read_terms(x_terms, scale, beta);
        const std::vector<GramTerm> z = read_terms(z_terms, scale, beta);
        const NtkGramCross problem{static_cast<DType>(dtype),
                                   n,
                                   m,
                                   c,
                                   x.data(),
                                   z.data(),
                                   static_cast<int64_t>(x.size()),
                                   pointer(kernel),
                                   kernel_stride,
                                   accumulate,
                                   threads};
        py::gil_scoped_release release;
        return ntk_gram_cross(problem);
      },
      py::arg("dtype"), py::arg("n"), py::arg("m"), py::arg("c"), py::arg("x_terms"), py::arg("z_terms"),
      py::arg("scale"), py::arg("beta"), py::arg("kernel"), py::arg("kernel_stride"), py::arg("accumulate"),
      py::arg("threads"), "Kernel between two sets of samples; arguments as in ntk_gram.");
}

}  // namespace catapult::bindings
