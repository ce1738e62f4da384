// Largest eigenvalue of many small symmetric matrices: a few Lanczos steps with a proven bracket, one warp or
// four for each matrix, which stays in shared memory; the direct method where the bracket does not close.
//
// The bracket needs no luck with the start. With m Lanczos vectors, T, and the coupling b to the next vector,
// ||K||_F^2 = ||T||_F^2 + 2 b^2 + ||K'||_F^2, where K' is the part not yet seen. So mu = ||K'||_F bounds the
// eigenvalues of K', and those of K are at most the largest one of T continued by one row with diagonal mu
// and coupling b, at least that of T. Where both agree to the tolerance the value is proven.
#include "cuda/householder.cuh"
#include "cuda/ops.h"
#include "cuda/topk_eigh.h"

namespace catapult::cuda {

namespace {

template <typename T>
constexpr double kNormRounding = sizeof(T) == 4 ? 4e-6 : 1e-14;  // of ||K||_F^2 minus what was seen of it
template <typename T>
constexpr double kNoCoupling = sizeof(T) == 4 ? 2e-6 : 1e-14;  // below it the next vector would be noise
constexpr double kAbove = 0.3;  // part of the tolerance that the bracket may have

template <typename T>
struct WarpArguments {
  int n, ld;
  const T* kernel;
  int64_t batch_stride, stride;
  double tol;
  T* values;
  int* open;  // [batch] 1 where the bracket did not close
  int* status;
};

template <int kWarps>
__device__ inline void team_barrier() {
  if (kWarps == 1)
    __syncwarp();
  else
    __syncthreads();
}

// products[p] = basis[p] . basis[m] for p <= m, sums of double.
template <typename T, int kWarps>
__device__ void project(const T* basis, int ld, int n, int m, double* products) {
  const int lane = threadIdx.x % 32;
  const T* w = basis + m * ld;
  for (int p = threadIdx.x / 32; p <= m; p += kWarps) {
    T sum = 0;
    for (int i = lane; i < n; i += 32) sum += basis[p * ld + i] * w[i];
    const double total = warp_sum_wide(static_cast<double>(sum));
    if (lane == 0) products[p] = total;
  }
}

// Element i of K x. Eight chains keep the rounding of equal terms, which does not cancel, small.
template <typename T>
__device__ double multiply_row(const T* matrix, int ld, int n, int i, const T* x) {
  T chain[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) chain[c] = 0;
  int j = 0;
  for (; j + 8 <= n; j += 8)
#pragma unroll
    for (int c = 0; c < 8; ++c) chain[c] += matrix[(j + c) * ld + i] * x[j + c];
  for (; j < n; ++j) chain[0] += matrix[j * ld + i] * x[j];
  double total = 0.0;
#pragma unroll
  for (int c = 0; c < 8; ++c) total += static_cast<double>(chain[c]);
  return total;
}

// Whether x exceeds all eigenvalues of the leading m rows of T, continued by a row with diagonal `corner`
// where that is given: whether all leading determinants of x - T are positive.
__device__ inline bool exceeds(const double* alpha, const double* squares, int m, double x,
                               const double* corner = nullptr) {
  double before = 0.0, current = 1.0;
  bool all = true;
  auto advance = [&](int i, double diagonal) {
    const double next = (x - diagonal) * current - (i > 0 ? squares[i - 1] * before : 0.0);
    all = all && next > 0.0;
    before = current;
    current = next;
  };
  for (int i = 0; i < m; ++i) advance(i, alpha[i]);
  if (corner != nullptr) advance(m, *corner);
  return all;
}

// A whole warp: largest eigenvalue of the leading m rows of T, which is above `low`, to `width` of itself.
__device__ inline double largest_of_tridiagonal(const double* alpha, const double* squares, int m, double low,
                                                double width) {
  double high = low;
  for (int i = 0; i < m; ++i)
    high = fmax(high, alpha[i] + (i > 0 ? sqrt(squares[i - 1]) : 0.0) + (i + 1 < m ? sqrt(squares[i]) : 0.0));
  for (int round = 0; round < kSectionRounds && high - low > width * fabs(high); ++round) {
    const bool above = !exceeds(alpha, squares, m, section(low, high, threadIdx.x % 32));
    narrow_interval(__ballot_sync(kFullWarp, above), low, high);
  }
  return 0.5 * (low + high);
}

// Whether the value of matrix blockIdx.x is known; the same in all threads.
template <typename T, int kWarps>
__device__ bool close_bracket(const WarpArguments<T>& arguments, double* shared, double frobenius,
                              const T* matrix, T* basis, double* value) {
  const int n = arguments.n, ld = arguments.ld, i = threadIdx.x;
  double* alpha = shared;  // each [kBracketSteps + 1]
  double* squares = alpha + kBracketSteps + 1;
  double* products = squares + kBracketSteps + 1;
  const double tol = arguments.tol;
  auto remove = [&](T w, int m) {  // what is left of w without the first m vectors
    double rest = static_cast<double>(w);
    for (int p = 0; p < m; ++p) rest -= products[p] * static_cast<double>(basis[p * ld + i]);
    return static_cast<T>(rest);
  };

  // The start is K times ones: close to the top vector for kernels whose first eigenvalue stands out.
  if (i < n) {
    double sum = 0.0;
    for (int j = 0; j < n; ++j) sum += static_cast<double>(matrix[j * ld + i]);
    basis[i] = static_cast<T>(sum);
  }
  team_barrier<kWarps>();
  project<T, kWarps>(basis, ld, n, 0, products);
  team_barrier<kWarps>();
  const double size = products[0];
  if (!(size > 1e-12 * frobenius)) return false;  // ones lies in the null space, nearly
  if (i < n) basis[i] = static_cast<T>(static_cast<double>(basis[i]) / sqrt(size));
  team_barrier<kWarps>();

  double seen = 0.0, previous_mu = 0.0, theta = 0.0, previous_square = 0.0, top = 0.0;
  for (int m = 1; m <= kBracketSteps && m <= n; ++m) {
    T w = 0;
    if (i < n) basis[m * ld + i] = w = static_cast<T>(multiply_row(matrix, ld, n, i, basis + (m - 1) * ld));
    team_barrier<kWarps>();
    project<T, kWarps>(basis, ld, n, m, products);
    team_barrier<kWarps>();
    const double own = products[m - 1];
    // Twice: one pass in float32 leaves noise that would be normalised into a false value.
    if (i < n) basis[m * ld + i] = w = remove(w, m);
    team_barrier<kWarps>();
    project<T, kWarps>(basis, ld, n, m, products);
    team_barrier<kWarps>();
    double square = products[m];
    for (int p = 0; p < m; ++p) square -= products[p] * products[p];
    square = fmax(square, 0.0);
    const double coupling = sqrt(square);
    top = m == 1 ? own : fmax(top, own);
    const bool noise = !(coupling > kNoCoupling<T> * fabs(top));
    if (i < n && !noise) basis[m * ld + i] = static_cast<T>(static_cast<double>(remove(w, m)) / coupling);
    if (i == 0) {
      alpha[m - 1] = own;
      squares[m - 1] = square;
    }
    team_barrier<kWarps>();

    seen += own * own + 2.0 * previous_square;
    previous_square = square;
    const double rest = frobenius - seen - 2.0 * square;
    const double mu = sqrt(fmax(rest, 0.0) + kNormRounding<T> * frobenius);
    const bool complete = m == n;  // K and T have the same eigenvalues
    if (complete || mu < top) {
      theta = largest_of_tridiagonal(alpha, squares, m, fmax(top, theta) * (1.0 - 1e-15),
                                     fmax(0.02 * tol, 4.0 * kDoubleEpsilon));
      *value = theta;
      if (complete || exceeds(alpha, squares, m, (1.0 + kAbove * tol) * theta, &mu)) return true;
    } else if (m >= 6 && mu > 0.8 * previous_mu) {
      return false;  // a flat spectrum: the direct method is cheaper than to go on
    }
    previous_mu = mu;
    if (noise) return false;
  }
  return false;
}

template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    lanczos_bracket_kernel(const __grid_constant__ WarpArguments<T> arguments) {
  const int n = arguments.n, ld = arguments.ld, lane = threadIdx.x % 32;
  const T* kernel = arguments.kernel + blockIdx.x * arguments.batch_stride;
  double* slots = static_cast<double*>(shared_memory());
  double* coefficients = slots + kReduceSlots;
  T* matrix = reinterpret_cast<T*>(coefficients + 3 * (kBracketSteps + 1));  // [n, ld]
  T* basis = matrix + n * ld;                                                // [kBracketSteps + 1, ld]

  double largest = 0.0;
  int bad = 0;
  for (int i = threadIdx.x / 32; i < n; i += kWarps)
    for (int j = lane; j <= i; j += 32) {
      const T value = kernel[i * arguments.stride + j];
      bad |= !isfinite(value);
      largest = fmax(largest, fabs(static_cast<double>(value)));
      matrix[i * ld + j] = value;
    }
  largest = block_max(largest, slots);
  if (__syncthreads_or(bad)) {
    if (threadIdx.x == 0) {
      arguments.values[blockIdx.x] = static_cast<T>(nan(""));
      arguments.open[blockIdx.x] = 0;
      raise_status(arguments.status, kNonFinite);
    }
    return;
  }
  if (largest == 0.0) {
    if (threadIdx.x == 0) {
      arguments.values[blockIdx.x] = 0;
      arguments.open[blockIdx.x] = 0;
    }
    return;
  }
  // By a power of two, exactly: squares neither overflow nor vanish.
  constexpr double kMost = sizeof(T) == 4 ? 126 : 1000;
  const int exponent = static_cast<int>(fmin(fmax(logb(largest), -kMost), kMost));
  const T scale = static_cast<T>(ldexp(1.0, -exponent));
  double frobenius = 0.0;
  for (int i = threadIdx.x / 32; i < n; i += kWarps) {
    T squares = 0;
    for (int j = lane; j <= i; j += 32) {  // the elements that this thread has loaded
      const T value = scale * matrix[i * ld + j];
      matrix[i * ld + j] = matrix[j * ld + i] = value;
      squares += i == j ? value * value : 2 * value * value;
    }
    frobenius += static_cast<double>(squares);
  }
  frobenius = block_sum(frobenius, slots);  // and a barrier behind the matrix

  double value = 0.0;
  const bool closed = close_bracket<T, kWarps>(arguments, coefficients, frobenius, matrix, basis, &value);
  if (threadIdx.x == 0) {
    if (closed) arguments.values[blockIdx.x] = static_cast<T>(ldexp(value, exponent));
    arguments.open[blockIdx.x] = !closed;
  }
}

template <typename T>
struct LargestArguments {
  int n, ld;
  const T* kernel;
  int64_t batch_stride, stride;
  T* values;
  const int* open;
  double* workspace;  // [batch, workspace_doubles]: the matrices, where they do not fit
  int64_t workspace_doubles;
};

// The direct method for the matrices that are still open; the other blocks return at once.
template <typename T>
__global__ void __launch_bounds__(kFusedThreads, 1)
    largest_value_kernel(const __grid_constant__ LargestArguments<T> arguments) {
  if (arguments.open[blockIdx.x] == 0) return;
  Householder<1> work{};
  work.n = arguments.n;
  work.ld = arguments.ld;
  double* next = static_cast<double*>(shared_memory());
  work.take_shared(next);
  work.matrix = arguments.workspace_doubles == 0
                    ? next
                    : arguments.workspace + blockIdx.x * arguments.workspace_doubles;
  const double norm =
      load_square(work, arguments.kernel + blockIdx.x * arguments.batch_stride, arguments.stride, 0.0);
  scale_square(work, norm);
  const double bound = tridiagonalise_fused(work);
  multisection_fused(work, 1, work.p);
  if (threadIdx.x == 0) arguments.values[blockIdx.x] = static_cast<T>(work.p[0] * bound * norm);
}

int64_t flags_doubles(int64_t batch) { return ceil_div(batch, 2); }

template <typename T>
void launch(const Norm& problem, const Context& context) {
  const Stream stream("spectral_norm", context.device, context.stream);
  const WarpPlan plan = plan_warp(problem.n, sizeof(T));
  const FusedPlan direct = plan_fused(problem.n, 0, stream.shared_limit());
  const T* kernel = static_cast<const T*>(problem.kernel);
  T* values = static_cast<T*>(problem.values);
  int* open = static_cast<int*>(context.workspace);
  const int n = static_cast<int>(problem.n), ld = static_cast<int>(plan.ld);
  const WarpArguments<T> arguments{
      n,      ld,   kernel,        problem.kernel_batch_stride, problem.kernel_stride, problem.tol,
      values, open, context.status};
  if (plan.threads == 32)
    stream.launch(lanczos_bracket_kernel<T, 1>, problem.batch, 32, plan.shared_bytes, arguments);
  else
    stream.launch(lanczos_bracket_kernel<T, 4>, problem.batch, 128, plan.shared_bytes, arguments);
  stream.launch(
      largest_value_kernel<T>, problem.batch, kFusedThreads, direct.shared_bytes,
      LargestArguments<T>{n, ld, kernel, problem.kernel_batch_stride, problem.kernel_stride, values, open,
                          static_cast<double*>(context.workspace) + flags_doubles(problem.batch),
                          direct.workspace_doubles});
}

}  // namespace

int64_t norm_warp_workspace_bytes(const Norm& problem, int device) {
  const int64_t limit = Stream("spectral_norm", device, 0).shared_limit();
  return 8 *
         (flags_doubles(problem.batch) + problem.batch * plan_fused(problem.n, 0, limit).workspace_doubles);
}

void launch_norm_warp(const Norm& problem, const Context& context) {
  if (problem.dtype == DType::kFloat32)
    launch<float>(problem, context);
  else
    launch<double>(problem, context);
}

}  // namespace catapult::cuda
