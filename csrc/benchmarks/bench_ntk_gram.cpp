#include <c10/core/InferenceMode.h>

#include <vector>

#include "bench.h"
#include "core/ntk_gram.h"

namespace catapult::benchmarks {
namespace {

// One hidden layer of the given widths, beta 0.5: range(0) samples, range(1) inputs, range(2) outputs of the
// layer; range(3): half of both is zero, as behind a ReLU.
struct Problem {
  int64_t n;
  at::Tensor a, b, kernel;

  explicit Problem(const benchmark::State& state)
      : n(state.range(0)),
        a(at::randn({n, state.range(1)})),
        b(at::randn({n, state.range(2)})),
        kernel(at::empty({n, n})) {
    if (state.range(3) != 0) {
      a.relu_();
      b.mul_(at::rand_like(b) < 0.5);
    }
  }

  double flop() const { return double(n) * double(n) * double(a.size(1) + b.size(1)); }

  double error() const {
    const at::Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
    return gram_error(kernel, (x.mm(x.t()) + 0.5) * y.mm(y.t()));
  }
};

void catapult_ntk_gram(benchmark::State& state) {
  const c10::InferenceMode guard;
  Problem p(state);
  const GramTerm term{p.a.data_ptr(), p.a.stride(0), p.a.size(1), p.b.data_ptr(), p.b.stride(0), 0,
                      p.b.size(1),    1.0,           0.5};
  const NtkGram problem{DType::kFloat32, p.n, 1, &term, 1, p.kernel.data_ptr(), p.n, false, 1};
  for (auto _ : state) benchmark::DoNotOptimize(ntk_gram(problem));
  report(state, p.flop());
  state.counters["error"] = p.error();
}

void aten_ntk_gram(benchmark::State& state) {
  const c10::InferenceMode guard;
  Problem p(state);
  for (auto _ : state) {
    at::Tensor features = p.a.mm(p.a.t());
    features += 0.5;
    p.kernel.zero_();
    p.kernel.addcmul_(features, p.b.mm(p.b.t()));
  }
  report(state, p.flop());
  state.counters["error"] = p.error();
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"n", "in", "out", "zeros"})->Unit(benchmark::kMicrosecond);
  b->Args({5, 100, 1024, 0})
      ->Args({5, 1024, 1, 0})
      ->Args({32, 100, 1024, 0})
      ->Args({128, 1024, 1024, 0})
      ->Args({128, 3072, 1024, 0});
  b->Args({512, 1024, 1024, 0})
      ->Args({2000, 1024, 1024, 0})
      ->Args({2000, 100, 1024, 0})
      ->Args({2000, 1024, 1024, 1});
}

BENCHMARK(catapult_ntk_gram)->Name("ntk_gram/catapult")->Apply(sizes);
BENCHMARK(aten_ntk_gram)->Name("ntk_gram/aten")->Apply(sizes);

}  // namespace
}  // namespace catapult::benchmarks
