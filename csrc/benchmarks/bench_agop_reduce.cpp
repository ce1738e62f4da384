#include <c10/core/InferenceMode.h>

#include "bench.h"
#include "core/agop_reduce.h"

namespace catapult::benchmarks {
namespace {

// range(0) rows of input gradients, range(1) features.
void catapult_agop_reduce(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t rows = state.range(0), d = state.range(1);
  const at::Tensor g = at::randn({rows, d}), agop = at::zeros({d, d});
  const AgopReduce problem{DType::kFloat32, rows, d, g.data_ptr(), d, 1.0 / double(rows),
                           agop.data_ptr(), d,    1};
  for (auto _ : state) benchmark::DoNotOptimize(agop_reduce(problem));
  report(state, double(rows) * double(d) * double(d));
}

void aten_agop_reduce(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t rows = state.range(0), d = state.range(1);
  const at::Tensor g = at::randn({rows, d});
  at::Tensor agop = at::zeros({d, d});
  for (auto _ : state) agop.addmm_(g.t(), g, 1.0, 1.0 / double(rows));
  report(state, double(rows) * double(d) * double(d));
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "d"})->Unit(benchmark::kMicrosecond);
  b->Args({5, 100})
      ->Args({128, 100})
      ->Args({2000, 100})
      ->Args({5000, 784})
      ->Args({128, 3072})
      ->Args({2000, 3072});
}

BENCHMARK(catapult_agop_reduce)->Name("agop_reduce/catapult")->Apply(sizes);
BENCHMARK(aten_agop_reduce)->Name("agop_reduce/aten")->Apply(sizes);

}  // namespace
}  // namespace catapult::benchmarks
