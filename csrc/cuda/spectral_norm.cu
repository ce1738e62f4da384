// Largest eigenvalue of many symmetric positive semi-definite matrices: Lanczos with full
// reorthogonalisation in double, one block per matrix, stopped by its residual. It starts from random
// numbers (a start like K 1 can be orthogonal to the top vector) and would reach the exact
// tridiagonal form after n steps, so that it always ends.
#include "cuda/device.cuh"
#include "cuda/fused_plan.h"
#include "cuda/ops.h"
#include "cuda/topk_eigh.h"
#include "cuda/tridiagonal.h"

namespace catapult::cuda {

namespace {

// From kWarpLimit to kLanczosLimit rows both are the same; beyond it the version chooses that of block
// Krylov.
enum Version : int { kSimple = 0, kWarp = 1, kVersions };

template <typename T>
struct LanczosArguments {
  int64_t n;
  const T* kernel;
  int64_t batch_stride, stride;
  double tol;
  T* values;
  double* workspace;  // [batch, n, n]: the basis
  int* status;
  bool matrix_in_shared;
};

// The largest eigenvalue of the leading `steps` of T, found by the first warp, in every thread.
__device__ double largest_ritz_value(const double* alpha, const double* beta, int64_t steps, double* slots) {
  if (threadIdx.x < 32) {
    double low, high;
    gershgorin(alpha, beta, steps, low, high);
    const double bound = fmax(fabs(low), fabs(high));
    const double tiny = fmax(1e-32 * bound, 1e-290);
    low -= 1e-15 * bound + tiny;
    high += 1e-15 * bound + tiny;
    for (int round = 0; round < kSectionRounds && high - low > 2.3e-16 * bound; ++round) {
      const bool above = count_above(alpha, beta, steps, section(low, high, threadIdx.x), tiny) > 0;
      narrow_interval(__ballot_sync(kFullWarp, above), low, high);
    }
    if (threadIdx.x == 0) slots[33] = 0.5 * (low + high);
  }
  __syncthreads();
  return slots[33];
}

template <typename T>
__global__ void __launch_bounds__(256) lanczos_kernel(const __grid_constant__ LanczosArguments<T> arguments) {
  const int64_t n = arguments.n, stride = arguments.stride;
  const T* kernel = arguments.kernel + blockIdx.x * arguments.batch_stride;
  double* basis = arguments.workspace + blockIdx.x * n * n;
  double* slots = static_cast<double*>(shared_memory());
  double* alpha = slots + kReduceSlots;
  double* beta = alpha + n;
  double* w = beta + n;
  double* products = w + n;
  T* copy = arguments.matrix_in_shared ? reinterpret_cast<T*>(products + n) : nullptr;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  double norm = 0.0;
  int bad = 0;
  for (int64_t i = warp; i < n; i += warps)
    for (int64_t j = lane; j < n; j += 32) {
      const double value = load_symmetric(kernel, stride, i, j);
      bad |= !isfinite(value);
      norm = fmax(norm, fabs(value));
      if (copy != nullptr) copy[i * n + j] = static_cast<T>(value);
    }
  norm = block_max(norm, slots);
  if (__syncthreads_or(bad)) {
    if (threadIdx.x == 0) {
      arguments.values[blockIdx.x] = static_cast<T>(nan(""));
      raise_status(arguments.status, kNonFinite);
    }
    return;
  }
  const double scale = fmax(norm, 1e-300);  // works on K / scale: squares neither overflow nor vanish

  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    basis[i] = counter_random(0, i);
    squares += basis[i] * basis[i];
  }
  squares = block_sum(squares, slots);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) basis[i] /= sqrt(squares);
  __syncthreads();

  double theta = 0.0, size = 0.0;  // size: of T so far
  for (int64_t step = 1; step <= n; ++step) {
    const double* q = basis + (step - 1) * n;
    for (int64_t i = warp; i < n; i += warps) {  // w = K q
      double dot = 0.0;
      for (int64_t j = lane; j < n; j += 32)
        dot +=
            (copy != nullptr ? static_cast<double>(copy[i * n + j]) : load_symmetric(kernel, stride, i, j)) *
            q[j];
      dot = warp_sum(dot);
      if (lane == 0) w[i] = dot / scale;
    }
    __syncthreads();
    for (int pass = 0; pass < 2; ++pass) {  // one pass leaves rounding noise that later looks like a vector
      for (int64_t p = warp; p < step; p += warps) {
        const double* other = basis + p * n;
        double dot = 0.0;
        for (int64_t i = lane; i < n; i += 32) dot += other[i] * w[i];
        dot = warp_sum(dot);
        if (lane == 0) products[p] = dot;
      }
      __syncthreads();
      if (pass == 0 && threadIdx.x == 0) alpha[step - 1] = products[step - 1];
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        double value = w[i];
        for (int64_t p = 0; p < step; ++p) value -= products[p] * basis[p * n + i];
        w[i] = value;
      }
      __syncthreads();
    }
    squares = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) squares += w[i] * w[i];
    const double next = sqrt(block_sum(squares, slots));
    size = fmax(size, fabs(alpha[step - 1]) + next);
    // Nothing left: the space is invariant and, from a random start, holds the top vector.
    const bool complete = step == n || next <= 1e-14 * size;
    if (complete || lanczos_checks(step)) {
      theta = largest_ritz_value(alpha, beta, step, slots);
      const double residual = next * last_component(alpha, beta, step, theta, 1e-290);
      if (complete || residual <= arguments.tol * fabs(theta)) break;  // the same in every thread
    }
    if (threadIdx.x == 0) beta[step - 1] = next;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) basis[step * n + i] = w[i] / next;
    __syncthreads();
  }
  if (threadIdx.x == 0) arguments.values[blockIdx.x] = static_cast<T>(theta * scale);
}

template <typename T>
void launch(const Norm& problem, const Context& context) {
  Stream stream("spectral_norm", context.device, context.stream);
  const T* kernel = static_cast<const T*>(problem.kernel);
  T* values = static_cast<T*>(problem.values);
  double* workspace = static_cast<double*>(context.workspace);
  if (problem.n <= kLanczosLimit) {
    const LanczosPlan plan = plan_lanczos(problem.n, sizeof(T));
    stream.launch(lanczos_kernel<T>, problem.batch, plan.threads, plan.shared_bytes,
                  LanczosArguments<T>{problem.n, kernel, problem.kernel_batch_stride, problem.kernel_stride,
                                      problem.tol, values, workspace, context.status, plan.matrix_in_shared});
    return;
  }
  for (int64_t i = 0; i < problem.batch; ++i) {
    const KrylovProblem<T> krylov{problem.n,
                                  1,
                                  kernel + i * problem.kernel_batch_stride,
                                  problem.kernel_stride,
                                  nullptr,
                                  0,
                                  problem.tol,
                                  values + i,
                                  nullptr,
                                  nullptr,
                                  workspace,
                                  context.status};
    problem.version == kWarp ? launch_krylov_fused(stream, krylov) : launch_krylov(stream, context, krylov);
  }
}

bool use_warp(const Norm& problem) { return problem.version == kWarp && problem.n <= kWarpLimit; }

}  // namespace

int64_t spectral_norm_workspace_bytes(const Norm& problem, int device) {
  if (problem.batch == 0 || problem.n == 0) return 0;
  if (use_warp(problem)) return norm_warp_workspace_bytes(problem, device);
  if (problem.n <= kLanczosLimit) return 8 * problem.batch * lanczos_workspace_doubles(problem.n);
  const int64_t limit = Stream("spectral_norm", device, 0).shared_limit();
  return 8 * (problem.version == kWarp ? plan_krylov_fused(problem.n, 1, limit).total_doubles
                                       : plan_krylov(problem.n, 1, limit).total_doubles);
}

void launch_spectral_norm(const Norm& problem, const Context& context) {
  check_version("spectral_norm", problem.version, kVersions);
  if (problem.batch == 0 || problem.n == 0) return;
  if (use_warp(problem)) return launch_norm_warp(problem, context);
  if (problem.dtype == DType::kFloat32)
    launch<float>(problem, context);
  else
    launch<double>(problem, context);
}

}  // namespace catapult::cuda
