// Pairs of benchmarks "<op>/catapult/..." and "<op>/aten/...": the same data, one thread, medians when run
// with
// --benchmark_repetitions. GFLOP/s count the work of the lower triangle for both.
#pragma once

#include <ATen/ATen.h>
#include <benchmark/benchmark.h>

#include "core/types.h"

namespace catapult::benchmarks {

// Largest |dK_ij| / sqrt(K_ii K_jj) against float64.
inline double gram_error(const at::Tensor& kernel, const at::Tensor& exact) {
  const at::Tensor norm = exact.diagonal().sqrt();
  return ((kernel.to(at::kDouble) - exact).abs() / (norm.unsqueeze(1) * norm.unsqueeze(0)))
      .max()
      .item<double>();
}

inline void report(benchmark::State& state, double flop) {
  state.counters["GFLOP/s"] = benchmark::Counter(flop * 1e-9, benchmark::Counter::kIsIterationInvariantRate,
                                                 benchmark::Counter::kIs1000);
}

}  // namespace catapult::benchmarks
