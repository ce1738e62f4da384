// Direct top-k eigenpairs of matrices of at most kFusedLimit rows, one block per matrix: version "fused".
#include "cuda/direct_fused.cuh"
#include "cuda/ops.h"
#include "cuda/topk_eigh.h"

namespace catapult::cuda {

namespace {

template <typename T>
struct FusedArguments {
  DirectProblem<T> problem;
  FusedPlan plan;
};

template <typename T, int kPanels>
__global__ void __launch_bounds__(kFusedThreads, 1)
    direct_fused_kernel(const __grid_constant__ FusedArguments<T> arguments) {
  const DirectProblem<T>& problem = arguments.problem;
  if (problem.skip != nullptr && *problem.skip != 0) return;
  const FusedPlan& plan = arguments.plan;
  const int n = static_cast<int>(problem.n), k = static_cast<int>(problem.k), ld = static_cast<int>(plan.ld);
  const T* kernel = problem.kernel + blockIdx.x * problem.batch_stride;
  T* values = problem.values + static_cast<int64_t>(blockIdx.x) * k;
  T* vectors = problem.vectors + static_cast<int64_t>(blockIdx.x) * n * k;
  T* residuals = problem.residuals + static_cast<int64_t>(blockIdx.x) * k;

  Householder<kPanels> work{};
  work.n = n;
  work.ld = ld;
  double* shared = static_cast<double*>(shared_memory());
  double* global = problem.workspace + blockIdx.x * plan.workspace_doubles;
  work.take_shared(shared);
  double*& matrix_from = plan.matrix_in_shared ? shared : global;
  work.matrix = matrix_from;
  matrix_from += n * ld;
  Eigenpairs pairs{};
  pairs.take(plan.vectors_in_shared ? shared : global, n, ld, k);

  const double norm = load_square(work, kernel, problem.stride, 0.0);
  if (isnan(norm)) {  // surfaces as NaN in every result and as a status
    for (int i = threadIdx.x; i < n * k; i += kFusedThreads) vectors[i] = static_cast<T>(norm);
    for (int j = threadIdx.x; j < k; j += kFusedThreads) values[j] = residuals[j] = static_cast<T>(norm);
    if (threadIdx.x == 0) raise_status(problem.status, kNonFinite);
    return;
  }
  const double scale = norm == 0.0 ? 1.0 : norm;
  scale_square(work, scale);
  const double bound = solve_direct(work, pairs);

  // Results as rounded to T, and the residual of exactly those.
  for (int i = threadIdx.x; i < n * k; i += kFusedThreads) {
    const int row = i / k, j = i % k;
    const T rounded = static_cast<T>(pairs.vectors[j * ld + row]);
    vectors[i] = rounded;
    pairs.vectors[j * ld + row] = static_cast<double>(rounded);
  }
  load_square(work, kernel, problem.stride, scale);  // and a barrier behind the vectors
  auto value_of = [&](int j) { return static_cast<T>(pairs.values[j] * bound * norm); };
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % 32, row_blocks = (n + 31) / 32, chunks = (k + kAtOnce - 1) / kAtOnce;
  double* squares = pairs.bands;  // [k, row_blocks]
  for (int item = threadIdx.x / 32; item < row_blocks * chunks; item += kFusedThreads / 32) {
    const int row_block = item % row_blocks, first = item / row_blocks * kAtOnce;
    const int i = 32 * row_block + lane;
    double sum[kAtOnce] = {};
    const double* x[kAtOnce];
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) x[c] = pairs.vectors + min(first + c, k - 1) * ld;
    if (i < n)
      for (int m = 0; m < n; ++m) {
        const double a = work.matrix[m * ld + i];
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) sum[c] += a * x[c][m];
      }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      const double value = static_cast<double>(value_of(min(first + c, k - 1))) / scale;
      const double difference = i < n ? sum[c] - value * x[c][i] : 0.0;
      sum[c] = difference * difference;
    }
    warp_sums(sum);
    if (lane == 0) {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c)
        if (first + c < k) squares[(first + c) * row_blocks + row_block] = sum[c];
    }
  }
  __syncthreads();
  const double accepted = (sizeof(T) == 4 ? 1e-5 : 1e-11) * bound;
  for (int j = threadIdx.x; j < k; j += kFusedThreads) {
    double sum = 0.0;
    for (int row_block = 0; row_block < row_blocks; ++row_block) sum += squares[j * row_blocks + row_block];
    values[j] = value_of(j);
    residuals[j] = static_cast<T>(sqrt(sum) * norm);
    if (!(sqrt(sum) <= accepted)) raise_status(problem.status, kNotConverged);
  }
}

}  // namespace

template <typename T>
void launch_direct_fused(const Stream& stream, const DirectProblem<T>& problem) {
  const FusedArguments<T> arguments{problem, plan_fused(problem.n, problem.k, stream.shared_limit())};
  stream.launch(arguments.plan.panels == 1 ? direct_fused_kernel<T, 1> : direct_fused_kernel<T, 2>,
                problem.batch, kFusedThreads, arguments.plan.shared_bytes, arguments);
}

template void launch_direct_fused<float>(const Stream&, const DirectProblem<float>&);
template void launch_direct_fused<double>(const Stream&, const DirectProblem<double>&);

}  // namespace catapult::cuda
