#include <c10/core/InferenceMode.h>

#include "bench.h"
#include "core/jacobian_accumulate.h"

namespace catapult::benchmarks {
namespace {

// A tile of range(0) kernel rows and range(1) parameters; the kernel and the weighted gradient are added to.
struct Problem {
  int64_t rows, cols;
  at::Tensor tile, weight, kernel, grad;

  explicit Problem(const benchmark::State& state)
      : rows(state.range(0)),
        cols(state.range(1)),
        tile(at::randn({rows, cols})),
        weight(at::randn({rows})),
        kernel(at::zeros({rows, rows})),
        grad(at::zeros({cols})) {}

  double flop() const {
    return double(rows) * double(rows) * double(cols) + 2.0 * double(rows) * double(cols);
  }
};

void catapult_jacobian_accumulate(benchmark::State& state) {
  const c10::InferenceMode guard;
  Problem p(state);
  const JacobianAccumulate problem{DType::kFloat32,
                                   p.rows,
                                   p.cols,
                                   p.tile.data_ptr(),
                                   p.cols,
                                   p.kernel.data_ptr(),
                                   p.rows,
                                   p.weight.data_ptr(),
                                   p.grad.data_ptr(),
                                   1};
  for (auto _ : state) benchmark::DoNotOptimize(jacobian_accumulate(problem));
  report(state, p.flop());
}

void aten_jacobian_accumulate(benchmark::State& state) {
  const c10::InferenceMode guard;
  Problem p(state);
  for (auto _ : state) {
    p.kernel.addmm_(p.tile, p.tile.t());
    p.grad.addmv_(p.tile.t(), p.weight);
  }
  report(state, p.flop());
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "cols"})->Unit(benchmark::kMicrosecond);
  b->Args({10, 65536})->Args({32, 36864})->Args({128, 16384})->Args({320, 6400});
}

BENCHMARK(catapult_jacobian_accumulate)->Name("jacobian_accumulate/catapult")->Apply(sizes);
BENCHMARK(aten_jacobian_accumulate)->Name("jacobian_accumulate/aten")->Apply(sizes);

}  // namespace
}  // namespace catapult::benchmarks
