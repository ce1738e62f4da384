#include <c10/core/InferenceMode.h>

#include <cstdint>
#include <vector>

#include "bench.h"
#include "core/topk_eigh.h"

namespace catapult::benchmarks {
namespace {

// `batch` kernels [batch, n, n] with a large first eigenvalue and a decaying rest, as tangent kernels have.
at::Tensor kernels(int64_t batch, int64_t n) {
  const at::Tensor features = at::randn({batch, n, n}) * at::arange(1, n + 1).pow(-0.75) + 0.5;
  return features.matmul(features.transpose(1, 2)).contiguous();
}

// range(0) the largest eigenpairs of one matrix of range(1).
void catapult_topk_eigh(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t k = state.range(0), n = state.range(1);
  const at::Tensor kernel = kernels(1, n);
  const at::Tensor values = at::empty({k}), vectors = at::empty({n, k}), residuals = at::empty({k});
  int8_t status = 0;
  const TopkEigh problem{DType::kFloat32,
                         1,
                         n,
                         k,
                         kernel.data_ptr(),
                         n * n,
                         n,
                         nullptr,
                         0,
                         1e-6,
                         EighMethod::kAuto,
                         values.data_ptr(),
                         vectors.data_ptr(),
                         residuals.data_ptr(),
                         &status,
                         1};
  for (auto _ : state) topk_eigh(problem);
  if (status != 0) state.SkipWithError("did not converge");
}

void aten_eigh(benchmark::State& state) {
  const c10::InferenceMode guard;
  const at::Tensor kernel = kernels(1, state.range(1)).squeeze(0);
  for (auto _ : state) benchmark::DoNotOptimize(at::linalg_eigh(kernel));
}

// range(0) matrices of range(1): the largest eigenvalue of each.
void catapult_spectral_norm(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t batch = state.range(0), n = state.range(1);
  const at::Tensor kernel = kernels(batch, n);
  const at::Tensor values = at::empty({batch});
  std::vector<int8_t> status(batch);
  const SpectralNorm problem{DType::kFloat32,   batch,         n, kernel.data_ptr(), n * n, n, 1e-6,
                             values.data_ptr(), status.data(), 1};
  for (auto _ : state) spectral_norm(problem);
  for (const int8_t each : status)
    if (each != 0) state.SkipWithError("did not converge");
}

void aten_eigvalsh(benchmark::State& state) {
  const c10::InferenceMode guard;
  const at::Tensor kernel = kernels(state.range(0), state.range(1));
  for (auto _ : state) benchmark::DoNotOptimize(at::linalg_eigvalsh(kernel));
}

void pairs(benchmark::internal::Benchmark* b) {
  b->ArgNames({"k", "n"})
      ->Unit(benchmark::kMicrosecond)
      ->Args({1, 5})
      ->Args({1, 32})
      ->Args({10, 128})
      ->Args({10, 512});
}

void batches(benchmark::internal::Benchmark* b) {
  b->ArgNames({"batch", "n"})
      ->Unit(benchmark::kMicrosecond)
      ->Args({1, 5})
      ->Args({500, 20})
      ->Args({500, 50})
      ->Args({500, 100});
}

BENCHMARK(catapult_topk_eigh)->Name("topk_eigh/catapult")->Apply(pairs);
BENCHMARK(aten_eigh)->Name("topk_eigh/aten")->Apply(pairs);
BENCHMARK(catapult_spectral_norm)->Name("spectral_norm/catapult")->Apply(batches);
BENCHMARK(aten_eigvalsh)->Name("spectral_norm/aten")->Apply(batches);

}  // namespace
}  // namespace catapult::benchmarks
