#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include "core/cpu_features.h"

int main(int argc, char** argv) {
  at::set_num_threads(1);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("catapult_simd", catapult::simd_name(catapult::simd_level()));
  benchmark::AddCustomContext("threads", "1");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
