#include <c10/core/InferenceMode.h>

#include "bench.h"
#include "core/rank_update.h"

namespace catapult::benchmarks {
namespace {

// range(0) samples, range(1) x range(2) weights; range(3): of the left factor half is zero, as behind a ReLU.
at::Tensor left_factor(const benchmark::State& state) {
  const at::Tensor left = at::randn({state.range(0), state.range(1)});
  return state.range(3) == 0 ? left : left.relu();
}

void catapult_rank_update(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t n = state.range(0), height = state.range(1), width = state.range(2);
  const at::Tensor left = left_factor(state), right = at::randn({n, width}), weight = at::randn({n, 1});
  const at::Tensor matrix = at::randn({height, width});
  const RankUpdate update{DType::kFloat32,
                          n,
                          height,
                          width,
                          left.data_ptr(),
                          height,
                          right.data_ptr(),
                          width,
                          weight.data_ptr(),
                          1,
                          -1e-6,
                          matrix.data_ptr(),
                          width};
  for (auto _ : state) {
    rank_updates(&update, 1, 1);
    benchmark::ClobberMemory();
  }
  report(state, 2.0 * double(n) * double(height) * double(width));
}

void aten_rank_update(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t n = state.range(0), height = state.range(1), width = state.range(2);
  const at::Tensor left = left_factor(state), right = at::randn({n, width}), weight = at::randn({n, 1});
  at::Tensor matrix = at::randn({height, width});
  for (auto _ : state) matrix.addmm_(left.t(), right * weight, 1.0, -1e-6);
  report(state, 2.0 * double(n) * double(height) * double(width));
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"n", "out", "in", "zeros"})->Unit(benchmark::kMicrosecond);
  b->Args({5, 1024, 100, 0})
      ->Args({32, 1024, 100, 0})
      ->Args({5, 1, 1024, 0})
      ->Args({32, 256, 256, 0})
      ->Args({5, 1024, 1024, 0})
      ->Args({128, 1024, 1024, 0})
      ->Args({128, 1024, 1024, 1})
      ->Args({2000, 1024, 100, 0})
      ->Args({2000, 1024, 100, 1});
}

BENCHMARK(catapult_rank_update)->Name("rank_update/catapult")->Apply(sizes);
BENCHMARK(aten_rank_update)->Name("rank_update/aten")->Apply(sizes);

}  // namespace
}  // namespace catapult::benchmarks
