// Top-k eigenpairs of one large matrix by block Krylov with restarts, in double whatever the matrix:
// basis [X, K X, K^2 X] orthonormal, Rayleigh-Ritz, the best block is the next X. The host enqueues a
// fixed number of passes; a flag on the device makes the launches after convergence return at once.
// Without convergence the direct solver, enqueued last, does the work: slowly, but right.
#include "cuda/gram_schmidt.cuh"
#include "cuda/ops.h"
#include "cuda/tile_product.cuh"
#include "cuda/topk_eigh.h"

namespace catapult::cuda {

namespace {

__device__ bool finished(const int* flag) { return flag != nullptr && *flag != kRunning; }

// vectors[j] <- column j of start, or random numbers beyond it: [block, n].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    krylov_start_kernel(double* vectors, int64_t n, int64_t block, const T* start, int64_t start_columns,
                        int* flag) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index == 0) *flag = kRunning;
  if (index >= n * block) return;
  const int64_t j = index / n, i = index % n;
  double value = counter_random(j, i);
  if (j < start_columns) {
    const double given = static_cast<double>(start[i * start_columns + j]);
    if (isfinite(given)) value = given;  // a start is a hint: a broken one costs passes, not the result
  }
  vectors[index] = value;
}

// Vectors [first, last) orthonormal after copying them from `source` (nullptr: they are there).
__global__ void __launch_bounds__(kEighThreads)
    krylov_orthonormal_kernel(double* vectors, const double* source, int64_t n, int64_t first, int64_t last,
                              const int* flag) {
  if (finished(flag)) return;
  double* slots = static_cast<double*>(shared_memory());
  if (source != nullptr) {
    for (int64_t i = threadIdx.x; i < (last - first) * n; i += blockDim.x) vectors[first * n + i] = source[i];
    __syncthreads();
  }
  gram_schmidt(vectors, n, first, last, slots + kReduceSlots, slots);
}

// Rows of a symmetric matrix of which the lower triangle is read, as double.
template <typename T>
struct SymmetricRows {
  const T* matrix;
  int64_t stride, n, first;
  bool above_diagonal;  // element (i, k) is read at (k, i): neighbouring rows are neighbours in memory

  using Row = int64_t;
  __device__ bool rows_fastest() const { return above_diagonal; }
  __device__ Row row(int r) const { return first + r; }
  __device__ double at(Row row, int64_t k) const {
    return row < n ? load_symmetric(matrix, stride, row, k) : 0.0;
  }
};

// products[j] = K vectors[j] for j < block: [block, n].
constexpr int kProductRows = 32;
template <typename T>
__global__ void __launch_bounds__(kThreads)
    krylov_product_kernel(const T* matrix, int64_t stride, int64_t n, const double* vectors, double* products,
                          int64_t block, const int* flag) {
  if (finished(flag)) return;
  const int64_t column_tiles = ceil_div(block, 16);
  const int64_t first = blockIdx.x / column_tiles * kProductRows, column = blockIdx.x % column_tiles * 16;
  const MatrixRows<double> y{vectors, n, 0, 1, 1, column, block};
  const int64_t diagonal = min(n, first + kProductRows);
  double below[2][1], above[2][1];
  tile_product<double, 2, 1>(SymmetricRows<T>{matrix, stride, n, first, false}, y, 0, diagonal, below);
  tile_product<double, 2, 1>(SymmetricRows<T>{matrix, stride, n, first, true}, y, diagonal, n, above);
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first + threadIdx.x / 16 + 16 * i, j = column + threadIdx.x % 16;
    if (row < n && j < block) products[j * n + row] = below[i][0] + above[i][0];
  }
}

// next_vectors = S^T vectors, next_products = S^T products, and the sums over this block's rows of the
// squares of (next_products - theta next_vectors): partials [block of rows, j].
__global__ void __launch_bounds__(kKrylovRows)
    krylov_rotate_kernel(const double* vectors, const double* products, const double* ritz_vectors,
                         const double* ritz_values, int64_t n, int64_t basis, int64_t block,
                         double* next_vectors, double* next_products, double* partials, const int* flag) {
  if (finished(flag)) return;
  constexpr int kColumns = 8;  // block is a multiple of 16
  double* slots = static_cast<double*>(shared_memory());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kKrylovRows + threadIdx.x;
  for (int64_t j0 = 0; j0 < block; j0 += kColumns) {
    double x[kColumns], w[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[j] = w[j] = 0.0;
    if (row < n)
      for (int64_t i = 0; i < basis; ++i) {
        const double v = vectors[i * n + row], p = products[i * n + row];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const double s = ritz_vectors[i * block + j0 + j];
          x[j] += s * v;
          w[j] += s * p;
        }
      }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (row < n) {
        next_vectors[(j0 + j) * n + row] = x[j];
        next_products[(j0 + j) * n + row] = w[j];
      }
      const double residual = w[j] - ritz_values[j0 + j] * x[j];
      const double squares = block_sum(residual * residual, slots);
      if (threadIdx.x == 0) partials[blockIdx.x * block + j0 + j] = squares;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    krylov_accept_kernel(double* vectors, double* products, const double* next_vectors,
                         const double* next_products, int64_t size, const int* flag) {
  if (finished(flag)) return;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= size) return;
  vectors[index] = next_vectors[index];
  products[index] = next_products[index];
}

// One block: converged when every wanted residual is at most tol |theta_1|.
__global__ void __launch_bounds__(kThreads)
    krylov_check_kernel(const double* partials, const double* ritz_values, int64_t row_blocks, int64_t block,
                        int64_t k, double tol, int* flag, int* status) {
  if (finished(flag)) return;
  int open = 0, broken = 0;
  for (int64_t j = threadIdx.x; j < k; j += kThreads) {
    double squares = 0.0;
    for (int64_t i = 0; i < row_blocks; ++i) squares += partials[i * block + j];
    open |= !(sqrt(squares) <= tol * fabs(ritz_values[0]));
    broken |= !isfinite(squares);
  }
  open = __syncthreads_or(open);
  broken = __syncthreads_or(broken);
  if (threadIdx.x != 0) return;
  *flag = broken ? kBroken : open ? kRunning : kConverged;
  if (broken) raise_status(status, kNonFinite);
}

// Block j: eigenpair j rounded to T, largest |component| positive; the working vector becomes the rounded
// one.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    krylov_finish_kernel(double* vectors, const double* ritz_values, int64_t n, int64_t k, T* values, T* out,
                         const int* flag) {
  if (*flag == kRunning) return;  // the direct solver takes over
  double* slots = static_cast<double*>(shared_memory());
  const int64_t j = blockIdx.x;
  double* x = vectors + j * n;
  double largest = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) largest = fmax(largest, fabs(x[i]));
  largest = block_max(largest, slots);
  double earliest = -static_cast<double>(n);  // minus the first index that holds it
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    if (fabs(x[i]) == largest) earliest = fmax(earliest, -static_cast<double>(i));
  earliest = block_max(earliest, slots);
  const int64_t where = static_cast<int64_t>(-earliest);
  const double sign = where < n && x[where] < 0.0 ? -1.0 : 1.0;
  __syncthreads();  // x[where] has been read by all
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const T rounded = static_cast<T>(sign * x[i]);
    x[i] = static_cast<double>(rounded);
    if (out != nullptr) out[i * k + j] = rounded;
  }
  if (threadIdx.x == 0) values[j] = static_cast<T>(ritz_values[j]);
}

// Block j: the residual of eigenpair j as returned.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    krylov_residual_kernel(const double* vectors, const double* products, int64_t n, const T* values,
                           T* residuals, const int* flag) {
  if (*flag == kRunning) return;
  const int64_t j = blockIdx.x;
  const double value = static_cast<double>(values[j]);
  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const double difference = products[j * n + i] - value * vectors[j * n + i];
    squares += difference * difference;
  }
  squares = block_sum(squares, static_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) residuals[j] = static_cast<T>(sqrt(squares));
}

}  // namespace

template <typename T>
void finish_krylov(const Stream& stream, const KrylovProblem<T>& problem, const KrylovResult& result,
                   const std::function<void()>& multiply) {
  const int64_t n = problem.n, k = problem.k;
  constexpr int64_t kSlots = kReduceSlots * 8;
  stream.launch(krylov_finish_kernel<T>, k, kThreads, kSlots, result.vectors, result.ritz_values, n, k,
                problem.values, problem.vectors, result.flag);
  T* own_vectors = reinterpret_cast<T*>(result.fallback_vectors);  // [n, k], then [k]
  if (problem.residuals != nullptr) {
    multiply();
    stream.launch(krylov_residual_kernel<T>, k, kThreads, kSlots, result.vectors, result.products, n,
                  problem.values, problem.residuals, result.flag);
  }
  launch_direct(stream,
                DirectProblem<T>{1, n, k, problem.kernel, 0, problem.stride, problem.values,
                                 problem.vectors == nullptr ? own_vectors : problem.vectors,
                                 problem.residuals == nullptr ? own_vectors + n * k : problem.residuals,
                                 result.fallback, problem.status, result.flag});
}

template <typename T>
void launch_krylov(const Stream& stream, const Context& context, const KrylovProblem<T>& problem) {
  const int64_t n = problem.n, k = problem.k;
  const KrylovPlan plan = plan_krylov(n, k, stream.shared_limit());
  const int64_t block = plan.block, basis = plan.basis;
  double* vectors = problem.workspace + plan.vectors;
  double* products = problem.workspace + plan.products;
  double* next_vectors = problem.workspace + plan.next_vectors;
  double* next_products = problem.workspace + plan.next_products;
  double* projected = problem.workspace + plan.projected;
  double* ritz_values = problem.workspace + plan.ritz_values;
  double* ritz_vectors = problem.workspace + plan.ritz_vectors;
  double* partials = problem.workspace + plan.partials;
  int* flag = reinterpret_cast<int*>(problem.workspace + plan.flag);
  constexpr int64_t kSlots = kReduceSlots * 8;

  auto orthonormalise = [&](int64_t step, const double* source) {
    stream.launch(krylov_orthonormal_kernel, 1, kEighThreads, kSlots + (step + 1) * block * 8, vectors,
                  source, n, step * block, (step + 1) * block, flag);
  };
  auto multiply = [&](int64_t step, const int* skip) {
    stream.launch(krylov_product_kernel<T>, ceil_div(n, kProductRows) * ceil_div(block, 16), kThreads,
                  tile_shared_bytes<double, 2, 1>(), problem.kernel, problem.stride, n,
                  vectors + step * block * n, products + step * block * n, block, skip);
  };

  // projected = vectors products^T, by the Gram kernel: one layer without an A part.
  GramLayer layer{};
  layer.x.b = vectors;
  layer.z.b = products;
  layer.x.b_stride = layer.z.b_stride = n;
  layer.x.b_column_stride = layer.z.b_column_stride = 1;
  layer.b_columns = n;
  layer.scale = layer.beta = 1.0;
  const Gram projection{DType::kFloat64, false, basis, basis, 1, &layer, 1, projected, basis, false, 0};
  Context inner = context;
  inner.workspace = problem.workspace + plan.gram;

  const DirectProblem<double> ritz{1,
                                   basis,
                                   block,
                                   projected,
                                   0,
                                   basis,
                                   ritz_values,
                                   ritz_vectors,
                                   problem.workspace + plan.ritz_residuals,
                                   problem.workspace + plan.direct,
                                   problem.status,
                                   flag};

  stream.launch(krylov_start_kernel<T>, ceil_div(n * block, kThreads), kThreads, 0, vectors, n, block,
                problem.start, problem.start == nullptr ? int64_t{0} : problem.start_columns, flag);
  orthonormalise(0, nullptr);
  multiply(0, flag);
  for (int pass = 0; pass < kKrylovPasses; ++pass) {
    for (int64_t step = 1; step < kKrylovSteps; ++step) {
      orthonormalise(step, products + (step - 1) * block * n);
      multiply(step, flag);
    }
    launch_ntk_gram(stream.op(), projection, inner);
    launch_direct(stream, ritz);
    stream.launch(krylov_rotate_kernel, plan.rotate_blocks, kKrylovRows, kSlots, vectors, products,
                  ritz_vectors, ritz_values, n, basis, block, next_vectors, next_products, partials, flag);
    stream.launch(krylov_accept_kernel, ceil_div(n * block, kThreads), kThreads, 0, vectors, products,
                  next_vectors, next_products, n * block, flag);
    stream.launch(krylov_check_kernel, 1, kThreads, 0, partials, ritz_values, plan.rotate_blocks, block, k,
                  problem.tol, flag, problem.status);
  }
  finish_krylov(stream, problem,
                KrylovResult{vectors, products, ritz_values, problem.workspace + plan.fallback,
                             problem.workspace + plan.fallback_vectors, flag},
                [&] { multiply(0, nullptr); });
}

template void finish_krylov<float>(const Stream&, const KrylovProblem<float>&, const KrylovResult&,
                                   const std::function<void()>&);
template void finish_krylov<double>(const Stream&, const KrylovProblem<double>&, const KrylovResult&,
                                    const std::function<void()>&);
template void launch_krylov<float>(const Stream&, const Context&, const KrylovProblem<float>&);
template void launch_krylov<double>(const Stream&, const Context&, const KrylovProblem<double>&);

}  // namespace catapult::cuda
