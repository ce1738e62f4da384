// Direct top-k eigenpairs, one block per matrix, in double: Householder tridiagonalisation,
// multisection by Sturm counts (one warp per eigenvalue), inverse iteration for all wanted vectors at
// once with Gram-Schmidt against all earlier ones (clusters and exact ties come out orthonormal),
// back-transformation. No step depends on gaps between eigenvalues, every loop has a fixed bound.
#include "cuda/gram_schmidt.cuh"
#include "cuda/ops.h"
#include "cuda/topk_eigh.h"
#include "cuda/tridiagonal.h"

namespace catapult::cuda {

namespace {

constexpr double kEpsilon = 2.220446049250313e-16;

template <typename T>
struct DirectArguments {
  DirectProblem<T> problem;
  DirectPlan plan;
};

// The working set of one block.
struct Work {
  int n, k;          // as int: a matrix with more rows than that does not fit
  double* matrix;    // [n, n] full square, scaled to largest entry 1; row s ends up holding reflector s
  double* d;         // [n]
  double* e;         // [n]
  double* tau;       // [n]
  double* v;         // [n] current reflector
  double* w;         // [n]
  double* vectors;   // [k, n]
  double* bands;     // [n, 3, k]
  double* values;    // [k] descending, of the scaled matrix
  double* products;  // [k] coefficients of Gram-Schmidt
  double* slots;     // shared
};

// Reads the lower triangle. Returns the largest |entry|, or NaN when one is not finite.
template <typename T>
__device__ double load_matrix(const Work& work, const T* kernel, int64_t stride) {
  double largest = 0.0;
  int bad = 0;
  for (int i = threadIdx.x / 32; i < work.n; i += blockDim.x / 32)
    for (int j = threadIdx.x % 32; j < work.n; j += 32) {
      const double value = load_symmetric(kernel, stride, i, j);
      bad |= !isfinite(value);
      largest = fabs(value) > largest ? fabs(value) : largest;
      work.matrix[static_cast<int64_t>(i) * work.n + j] = value;
    }
  largest = block_max(largest, work.slots);
  return __syncthreads_or(bad) ? nan("") : largest;
}

__device__ void scale_matrix(const Work& work, double norm) {
  const int64_t size = static_cast<int64_t>(work.n) * work.n;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) work.matrix[i] /= norm;
  __syncthreads();
}

// H_{n-3} .. H_0 A H_0 .. H_{n-3} = T with H_s = 1 - tau_s v_s v_s^T, v_s zero up to s, 1 at s + 1.
__device__ void tridiagonalise(const Work& work) {
  const int n = work.n, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int s = 0; s + 2 < n; ++s) {
    double* row = work.matrix + static_cast<int64_t>(s) * n;
    double squares = 0.0;
    for (int j = s + 2 + static_cast<int>(threadIdx.x); j < n; j += blockDim.x) squares += row[j] * row[j];
    squares = block_sum(squares, work.slots);
    const double head = row[s + 1];
    double beta = head, tau = 0.0, inverse = 0.0;
    if (squares > 0.0) {
      beta = -copysign(sqrt(head * head + squares), head);
      tau = (beta - head) / beta;
      inverse = 1.0 / (head - beta);
    }
    __syncthreads();  // row[s + 1] has been read by all
    for (int j = s + 1 + static_cast<int>(threadIdx.x); j < n; j += blockDim.x) {
      const double value = j == s + 1 ? 1.0 : row[j] * inverse;
      work.v[j] = value;
      row[j] = value;
    }
    if (threadIdx.x == 0) {
      work.d[s] = row[s];
      work.e[s] = beta;
      work.tau[s] = tau;
    }
    __syncthreads();
    if (tau == 0.0) continue;  // the same for all threads: nothing to reflect
    double dot = 0.0;
    for (int i = s + 1 + warp; i < n; i += warps) {  // w = A v
      const double* a = work.matrix + static_cast<int64_t>(i) * n;
      double sum = 0.0;
      for (int j = s + 1 + lane; j < n; j += 32) sum += a[j] * work.v[j];
      sum = warp_sum(sum);
      if (lane == 0) {
        work.w[i] = sum;
        dot += sum * work.v[i];
      }
    }
    dot = block_sum(dot, work.slots);  // v^T A v
    for (int j = s + 1 + static_cast<int>(threadIdx.x); j < n; j += blockDim.x)
      work.w[j] = tau * (work.w[j] - 0.5 * tau * dot * work.v[j]);
    __syncthreads();
    for (int i = s + 1 + warp; i < n; i += warps) {  // A -= v w^T + w v^T
      double* a = work.matrix + static_cast<int64_t>(i) * n;
      const double vi = work.v[i], wi = work.w[i];
      for (int j = s + 1 + lane; j < n; j += 32) a[j] -= vi * work.w[j] + wi * work.v[j];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    for (int s = n > 1 ? n - 2 : 0; s < n; ++s) {
      work.d[s] = work.matrix[static_cast<int64_t>(s) * n + s];
      work.e[s] = s + 1 < n ? work.matrix[static_cast<int64_t>(s) * n + s + 1] : 0.0;
      work.tau[s] = 0.0;
    }
  }
  __syncthreads();
}

// The k largest eigenvalues of T: a warp narrows the interval of one of them, a lane per shift.
// Returns the spectral bound.
__device__ double multisection(const Work& work) {
  double bound_low, bound_high;
  gershgorin(work.d, work.e, work.n, bound_low, bound_high);
  const double bound = fmax(fabs(bound_low), fabs(bound_high));
  const double tiny = fmax(kEpsilon * kEpsilon * bound, 1e-290);
  const int lane = threadIdx.x % 32;
  for (int rank = threadIdx.x / 32; rank < work.k; rank += blockDim.x / 32) {
    double low = bound_low - 4.0 * kEpsilon * bound - tiny, high = bound_high + 4.0 * kEpsilon * bound + tiny;
    for (int round = 0; round < kSectionRounds && high - low > kEpsilon * bound; ++round) {
      const bool above = count_above(work.d, work.e, work.n, section(low, high, lane), tiny) > rank;
      narrow_interval(__ballot_sync(kFullWarp, above), low, high);
    }
    if (lane == 0) work.values[rank] = bound > 0.0 ? 0.5 * (low + high) : 0.0;
  }
  __syncthreads();
  return bound;
}

__device__ void tridiagonal_vectors(const Work& work, double bound) {
  const int n = work.n, k = work.k;
  for (int j = threadIdx.x / 32; j < k; j += blockDim.x / 32)
    for (int i = threadIdx.x % 32; i < n; i += 32)
      work.vectors[static_cast<int64_t>(j) * n + i] = counter_random(j, i);
  __syncthreads();
  const double tiny = fmax(kEpsilon * bound, 1e-290);
  for (int iteration = 0; iteration < kInverseIterations; ++iteration) {
    for (int j = threadIdx.x; j < k; j += blockDim.x)
      shifted_solve(work.d, work.e, n, work.values[j], tiny, work.vectors + static_cast<int64_t>(j) * n, 1,
                    work.bands + j, k);
    __syncthreads();
    gram_schmidt(work.vectors, n, 0, k, work.products, work.slots);
  }
}

// vectors[j] <- H_0 .. H_{n-3} vectors[j], a warp per vector; largest |component| made positive.
__device__ void back_transform(const Work& work) {
  const int n = work.n, lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < work.k; j += blockDim.x / 32) {
    double* x = work.vectors + static_cast<int64_t>(j) * n;
    for (int s = n - 3; s >= 0; --s) {
      if (work.tau[s] == 0.0) continue;
      const double* v = work.matrix + static_cast<int64_t>(s) * n;
      double dot = 0.0;
      for (int i = s + 1 + lane; i < n; i += 32) dot += v[i] * x[i];
      dot = work.tau[s] * warp_sum(dot);
      for (int i = s + 1 + lane; i < n; i += 32) x[i] -= dot * v[i];
      __syncwarp();
    }
    double extreme = 0.0;
    int where = n;
    for (int i = lane; i < n; i += 32)
      if (fabs(x[i]) > fabs(extreme)) {
        extreme = x[i];
        where = i;
      }
    warp_extreme(extreme, where);
    if (extreme < 0.0)
      for (int i = lane; i < n; i += 32) x[i] = -x[i];
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kEighThreads)
    direct_kernel(const __grid_constant__ DirectArguments<T> arguments) {
  const DirectProblem<T>& problem = arguments.problem;
  if (problem.skip != nullptr && *problem.skip != 0) return;
  const int64_t n = problem.n, k = problem.k;
  const T* kernel = problem.kernel + blockIdx.x * problem.batch_stride;
  T* values = problem.values + blockIdx.x * k;
  T* vectors = problem.vectors + blockIdx.x * n * k;
  T* residuals = problem.residuals + blockIdx.x * k;

  Work work{};
  work.n = static_cast<int>(n);
  work.k = static_cast<int>(k);
  work.slots = static_cast<double*>(shared_memory());
  double* next = problem.workspace + blockIdx.x * arguments.plan.workspace_doubles;
  auto take = [&next](int64_t doubles) {
    double* pointer = next;
    next += doubles;
    return pointer;
  };
  work.d = take(n);
  work.e = take(n);
  work.tau = take(n);
  work.v = take(n);
  work.w = take(n);
  work.vectors = take(n * k);
  work.bands = take(3 * n * k);
  work.values = take(k);
  work.products = take(k);
  work.matrix = arguments.plan.matrix_in_shared ? work.slots + kReduceSlots : take(n * n);

  double norm = load_matrix(work, kernel, problem.stride);
  if (isnan(norm)) {  // surfaces as NaN in every result and as a status
    for (int64_t i = threadIdx.x; i < n * k; i += blockDim.x) vectors[i] = static_cast<T>(norm);
    for (int64_t j = threadIdx.x; j < k; j += blockDim.x) values[j] = residuals[j] = static_cast<T>(norm);
    if (threadIdx.x == 0) raise_status(problem.status, kNonFinite);
    return;
  }
  if (norm == 0.0) norm = 1.0;
  scale_matrix(work, norm);
  tridiagonalise(work);
  const double bound = multisection(work);
  tridiagonal_vectors(work, bound);
  back_transform(work);

  // Results as rounded to T, and the residual of exactly those.
  for (int64_t i = threadIdx.x; i < n * k; i += blockDim.x) {
    const int64_t row = i / k, j = i % k;
    const T rounded = static_cast<T>(work.vectors[j * n + row]);
    vectors[i] = rounded;
    work.vectors[j * n + row] = static_cast<double>(rounded);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const double accepted = (sizeof(T) == 4 ? 1e-5 : 1e-11) * bound;
  for (int64_t j = threadIdx.x / 32; j < k; j += blockDim.x / 32) {
    const double* x = work.vectors + j * n;
    const T value = static_cast<T>(work.values[j] * norm);
    double squares = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      double dot = 0.0;
      for (int64_t m = lane; m < n; m += 32)
        dot += load_symmetric(kernel, problem.stride, i, m) / norm * x[m];
      const double difference = warp_sum(dot) - static_cast<double>(value) / norm * x[i];
      squares += difference * difference;
    }
    if (lane == 0) {
      values[j] = value;
      residuals[j] = static_cast<T>(sqrt(squares) * norm);
      if (!(sqrt(squares) <= accepted)) raise_status(problem.status, kNotConverged);
    }
  }
}

}  // namespace

template <typename T>
void launch_direct(const Stream& stream, const DirectProblem<T>& problem) {
  DirectArguments<T> arguments{problem, plan_direct(problem.n, problem.k, stream.shared_limit())};
  stream.launch(direct_kernel<T>, problem.batch, kEighThreads, arguments.plan.shared_bytes, arguments);
}

template void launch_direct<float>(const Stream&, const DirectProblem<float>&);
template void launch_direct<double>(const Stream&, const DirectProblem<double>&);

}  // namespace catapult::cuda
