// The only place that starts threads. On GNU/Linux this is OpenMP (the module is compiled with
// -fopenmp but not linked against libgomp, so that the symbols resolve to the runtime that torch
// brought along); elsewhere std::thread. The thread count is always the caller's.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

namespace catapult {

// Calls body(worker, workers) once per worker. Work must be split by the (worker, workers) pair
// alone, never by who comes first, so that results are bitwise repeatable for a thread count.
template <typename Body>
void parallel_workers(int threads, const Body& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    // The runtime may grant fewer threads than asked for: every share is still done, in turn.
#pragma omp for schedule(static, 1)
    for (int worker = 0; worker < threads; ++worker) body(worker, threads);
  }
#else
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  for (int worker = 1; worker < threads; ++worker)
    pool.emplace_back([&body, worker, threads] { body(worker, threads); });
  body(0, threads);
  for (std::thread& thread : pool) thread.join();
#endif
}

}  // namespace catapult
