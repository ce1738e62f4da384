// Block Krylov as in topk_eigh_krylov.cu, version "fused": four launches a pass. Products K X run on the
// tensor cores in double. All else between two products is one launch of a cluster of blocks that share the
// rows and add up what they find through each other's shared memory, in the order of their ranks: the basis
// becomes orthonormal by block Gram-Schmidt and Cholesky factors; the projected problem is solved in one of
// the blocks, all of them rotate their rows, decide on convergence and begin the next pass.
#include "cuda/cluster.cuh"
#include "cuda/direct_fused.cuh"
#include "cuda/mma.cuh"
#include "cuda/ops.h"
#include "cuda/topk_eigh.h"

namespace catapult::cuda {

namespace {

constexpr int kWarps = kFusedThreads / 32;

// ---- products = K vectors, [columns, n] each

// kTiles times 16 rows and 16 columns; the warps share the depth.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kFusedThreads)
    block_product_kernel(const T* matrix, int64_t stride, int64_t n, const double* vectors, double* products,
                         int64_t column_tiles, const int* flag) {
  if (flag != nullptr && *flag != kRunning) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first = blockIdx.x / column_tiles * (16 * kTiles), column = blockIdx.x % column_tiles * 16;
  double sum[kTiles][2][4] = {};
  for (int64_t k0 = 8 * warp; k0 < n; k0 += 8 * kWarps) {
    double x[2][2], a[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t k = k0 + t + 4 * h;
#pragma unroll
      for (int q = 0; q < 2; ++q) x[q][h] = k < n ? vectors[(column + 8 * q + g) * n + k] : 0.0;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t i = first + 16 * tile + 8 * half + g, k = k0 + t + 4 * h;
          a[2 * h + half] = i < n && k < n ? load_symmetric(matrix, stride, i, k) : 0.0;
        }
      mma_f64(sum[tile][0], a, x[0]);
      mma_f64(sum[tile][1], a, x[1]);
    }
  }
  double* scratch = static_cast<double*>(shared_memory());  // [kWarps, 16 columns, 16 kTiles]
  constexpr int kRows = 16 * kTiles;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        scratch[(warp * 16 + 8 * q + 2 * t + c % 2) * kRows + 16 * tile + g + 8 * (c / 2)] = sum[tile][q][c];
  __syncthreads();
  for (int element = threadIdx.x; element < 16 * kRows; element += kFusedThreads) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += scratch[w * 16 * kRows + element];
    const int64_t row = first + element % kRows;
    if (row < n) products[(column + element / kRows) * n + row] = total;
  }
}

// ---- the cluster

template <typename T>
struct ClusterArguments {
  int64_t n, k;
  double tol;
  double *vectors, *products;   // [basis, n]
  double *ritz_values, *bands;  // [block], [basis, 5, block]
  const T* start;               // [n, start_columns] or nullptr
  int64_t start_columns;
  int *flag, *status;
  int step;  // which block of the basis becomes orthonormal; kKrylovSteps: the projected problem, then block
             // 1
};

// Shared memory of a block of the cluster: exchange, then what is used within the block.
template <int kBlock>
struct ClusterWork {
  static constexpr int kBasis = kKrylovSteps * kBlock, kSquare = kBlock * kBlock;
  static_assert(kKrylovSteps == 3, "the exchange has three parts");
  int64_t n, first, end;  // rows of this block
  int rank;
  double* exchange;  // [9, kSquare]: two buffers that others read, and the total; or [kBasis, kBasis]
  double* norms;     // [kBlock]
  double* inverse;   // [kBlock] 1 / diagonal of the Cholesky factor, 0: the column is replaced
  double* factor;    // [kBlock, kBlock]
  double* scratch;   // [kWarps, 48, 16], or the inner solver
};

// out[p, j] = left[p] . right[j] over the rows of this block: [left_columns, right_columns], multiples of 16.
template <int kBlock>
__device__ void multiply_rows(const ClusterWork<kBlock>& work, const double* left, int left_columns,
                              const double* right, int right_columns, double* out, int out_stride) {
  constexpr int kTiles = 3;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t n = work.n;
  for (int p0 = 0; p0 < left_columns; p0 += 16 * kTiles)
    for (int j0 = 0; j0 < right_columns; j0 += 16) {
      double sum[kTiles][2][4] = {};
      for (int64_t i0 = work.first + 8 * warp; i0 < work.end; i0 += 8 * kWarps) {
        double b[2][2], a[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t i = i0 + t + 4 * h;
#pragma unroll
          for (int q = 0; q < 2; ++q) b[q][h] = i < work.end ? right[(j0 + 8 * q + g) * n + i] : 0.0;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (p0 + 16 * tile >= left_columns) continue;
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int64_t i = i0 + t + 4 * h;
              a[2 * h + half] = i < work.end ? left[(p0 + 16 * tile + 8 * half + g) * n + i] : 0.0;
            }
          mma_f64(sum[tile][0], a, b[0]);
          mma_f64(sum[tile][1], a, b[1]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            work.scratch[(warp * 48 + 16 * tile + g + 8 * (c / 2)) * 16 + 8 * q + 2 * t + c % 2] =
                sum[tile][q][c];
      __syncthreads();
      for (int element = threadIdx.x; element < 48 * 16; element += kFusedThreads) {
        const int p = p0 + element / 16, j = j0 + element % 16;
        if (p >= left_columns) continue;
        double total = 0.0;
        for (int w = 0; w < kWarps; ++w) total += work.scratch[w * 48 * 16 + element];
        out[p * out_stride + j] = total;
      }
      __syncthreads();
    }
}

// total[i] = sum of own[i] over the blocks of the cluster, for all threads of this block.
template <int kBlock>
__device__ void sum_over_cluster(const double* own, int count, double* total) {
  cluster_barrier();
  for (int i = threadIdx.x; i < count; i += kFusedThreads) {
    double sum = 0.0;
#pragma unroll
    for (int rank = 0; rank < kKrylovCluster; ++rank) sum += load_from_block(own + i, rank);
    total[i] = sum;
  }
  __syncthreads();
}

// One warp: Cholesky factor of work.factor (upper triangle, in place). A column of which nothing is left
// beyond the rounding of what it was made of gets inverse 0 and couples to no other.
template <int kBlock>
__device__ void factorise(const ClusterWork<kBlock>& work, bool first_time) {
  const int c = threadIdx.x < kBlock ? static_cast<int>(threadIdx.x) : 0;
  double column[kBlock];
#pragma unroll
  for (int r = 0; r < kBlock; ++r) column[r] = work.factor[r * kBlock + c];
  const double own = work.factor[c * kBlock + c];
  const double least = fmax(1e-13 * own, first_time ? 1e-26 * work.norms[c] : 0.0);
  __syncwarp();
#pragma unroll
  for (int l = 0; l < kBlock; ++l) {
    if (c == l && threadIdx.x < kBlock)
      work.inverse[l] = column[l] > least && isfinite(column[l]) ? 1.0 / sqrt(column[l]) : 0.0;
    __syncwarp();
    const double inverse = work.inverse[l];
    const double value = inverse == 0.0 ? 0.0 : column[l] * inverse;
    if (threadIdx.x < kBlock) work.factor[l * kBlock + c] = value;
    __syncwarp();
#pragma unroll
    for (int r = l + 1; r < kBlock; ++r) column[r] -= work.factor[l * kBlock + r] * value;
  }
}

// Block `step` of the vectors <- K times the block before (step > 0), orthonormal to itself and to the blocks
// before. First a projection; then twice projection and Cholesky factor, since a factor of what is nearly
// dependent is exact only the second time. Dependent columns are replaced by random ones.
template <int kBlock>
__device__ void extend_basis(const ClusterWork<kBlock>& work, double* vectors, const double* products,
                             int step) {
  constexpr int kSquare = ClusterWork<kBlock>::kSquare;
  const int64_t n = work.n;
  const int before = step * kBlock;
  double* w = vectors + before * n;
  double* total = work.exchange + 6 * kSquare;  // [before, kBlock] V^T W, then [kBlock, kBlock] W^T W
  const double* gram = total + before * kBlock;
  for (int round = step > 0 ? 0 : 1; round < 3; ++round) {
    double* own = work.exchange + round % 2 * 3 * kSquare;  // others may still read the other one
    const double* source = round == 0 ? products + (step - 1) * kBlock * n : w;
    multiply_rows(work, vectors, before, source, kBlock, own, kBlock);
    multiply_rows(work, source, kBlock, source, kBlock, own + before * kBlock, kBlock);
    sum_over_cluster<kBlock>(own, (before + kBlock) * kBlock, total);
    if (round == 0) {
      if (threadIdx.x < kBlock) work.norms[threadIdx.x] = gram[threadIdx.x * kBlock + threadIdx.x];
    } else {
      if (step == 0 && round == 1 && threadIdx.x < kBlock) work.norms[threadIdx.x] = 0.0;
      for (int element = threadIdx.x; element < kSquare; element += kFusedThreads) {
        const int r = element / kBlock, c = element % kBlock;
        double value = gram[element];
        for (int p = 0; p < before; ++p) value -= total[p * kBlock + r] * total[p * kBlock + c];
        work.factor[element] = value;
      }
      __syncthreads();
      if (threadIdx.x < 32) factorise(work, round == 1);
      __syncthreads();
    }
    for (int64_t i = work.first + threadIdx.x; i < work.end; i += kFusedThreads) {
      double x[kBlock];
#pragma unroll
      for (int j = 0; j < kBlock; ++j) x[j] = source[j * n + i];
      for (int p = 0; p < before; ++p) {
        const double v = vectors[p * n + i];
#pragma unroll
        for (int j = 0; j < kBlock; ++j) x[j] -= v * total[p * kBlock + j];
      }
      if (round > 0) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
#pragma unroll
          for (int l = 0; l < j; ++l) x[j] -= x[l] * work.factor[l * kBlock + j];
          x[j] = work.inverse[j] == 0.0
                     ? counter_random(static_cast<uint64_t>(3000000 + 3 * (before + j) + round), i)
                     : x[j] * work.inverse[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kBlock; ++j) w[j * n + i] = x[j];
    }
    __syncthreads();
  }
}

// Rayleigh-Ritz: vectors and products of the first block <- those of the best eigenpairs in the basis.
// Returns the flag, the same in all blocks.
template <typename T, int kBlock>
__device__ int rotate_basis(const ClusterWork<kBlock>& work, const ClusterArguments<T>& arguments) {
  constexpr int kBasis = ClusterWork<kBlock>::kBasis, kSquare = ClusterWork<kBlock>::kSquare;
  constexpr int kLine = kBasis | 1;
  const int64_t n = work.n;
  double *vectors = arguments.vectors, *products = arguments.products;
  multiply_rows(work, vectors, kBasis, products, kBasis, work.exchange, kBasis);
  cluster_barrier();

  Householder<1> inner{};
  Eigenpairs pairs{};
  inner.n = kBasis;
  inner.ld = kLine;
  double* next = work.scratch;
  inner.take_shared(next);
  inner.matrix = next;
  next += kBasis * kLine;
  pairs.take(next, kBasis, kLine, kBlock);
  if (kBlock > 16) pairs.bands = arguments.bands;
  if (work.rank == 0) {
    double largest = 0.0;
    int bad = 0;
    for (int element = threadIdx.x; element < kBasis * kBasis; element += kFusedThreads) {
      const int i = element / kBasis, j = element % kBasis;
      if (j > i) continue;
      double sum = 0.0;
      for (int rank = 0; rank < kKrylovCluster; ++rank) sum += load_from_block(work.exchange + element, rank);
      bad |= !isfinite(sum);
      largest = fmax(largest, fabs(sum));
      inner.matrix[i * kLine + j] = inner.matrix[j * kLine + i] = sum;
    }
    largest = block_max(largest, inner.slots);
    if (__syncthreads_or(bad)) {
      for (int j = threadIdx.x; j < kBlock; j += kFusedThreads) pairs.values[j] = nan("");
      for (int i = threadIdx.x; i < kBlock * kLine; i += kFusedThreads) pairs.vectors[i] = nan("");
    } else {
      scale_square(inner, largest == 0.0 ? 1.0 : largest);
      const double bound = solve_direct(inner, pairs);
      for (int j = threadIdx.x; j < kBlock; j += kFusedThreads) pairs.values[j] *= bound * largest;
    }
  }
  __syncthreads();
  cluster_barrier();

  double* rotation = work.exchange;                // [kBasis, kBlock]
  double* values = work.exchange + 3 * kSquare;    // [kBlock]
  double* squares = work.exchange + 4 * kSquare;   // [kBlock] of the residuals, over the rows of this block
  double* of_warps = work.exchange + 5 * kSquare;  // [kWarps, kBlock]
  for (int element = threadIdx.x; element < kBasis * kBlock; element += kFusedThreads)
    rotation[element] = load_from_block(pairs.vectors + element % kBlock * kLine + element / kBlock, 0);
  if (threadIdx.x < kBlock) values[threadIdx.x] = load_from_block(pairs.values + threadIdx.x, 0);
  __syncthreads();

  double sums[kBlock];
#pragma unroll
  for (int j = 0; j < kBlock; ++j) sums[j] = 0.0;
  for (int64_t i = work.first + threadIdx.x; i < work.end; i += kFusedThreads) {
    double x[kBlock], y[kBlock];
#pragma unroll
    for (int j = 0; j < kBlock; ++j) x[j] = y[j] = 0.0;
    for (int p = 0; p < kBasis; ++p) {
      const double v = vectors[p * n + i], u = products[p * n + i];
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        x[j] += v * rotation[p * kBlock + j];
        y[j] += u * rotation[p * kBlock + j];
      }
    }
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      vectors[j * n + i] = x[j];
      products[j * n + i] = y[j];
      const double residual = y[j] - values[j] * x[j];
      sums[j] += residual * residual;
    }
  }
#pragma unroll
  for (int j = 0; j < kBlock; j += 4) {
    double four[4] = {sums[j], sums[j + 1], sums[j + 2], sums[j + 3]};
    warp_sums(four);
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int q = 0; q < 4; ++q) of_warps[threadIdx.x / 32 * kBlock + j + q] = four[q];
  }
  __syncthreads();
  if (threadIdx.x < kBlock) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w * kBlock + threadIdx.x];
    squares[threadIdx.x] = sum;
  }
  __syncthreads();
  cluster_barrier();
  int open = 0;
  if (threadIdx.x < arguments.k) {
    double sum = 0.0;
    for (int rank = 0; rank < kKrylovCluster; ++rank) sum += load_from_block(squares + threadIdx.x, rank);
    open = !(sqrt(sum) <= arguments.tol * fabs(values[0]));
    open |= isfinite(sum) ? 0 : 2;
  }
  const int running = __syncthreads_or(open & 1), broken = __syncthreads_or(open & 2);
  const int flag = broken != 0 ? kBroken : running != 0 ? kRunning : kConverged;
  if (work.rank == 0) {
    if (threadIdx.x < kBlock) arguments.ritz_values[threadIdx.x] = values[threadIdx.x];
    if (threadIdx.x == 0) {
      *arguments.flag = flag;
      if (flag == kBroken) raise_status(arguments.status, kNonFinite);
    }
  }
  return flag;
}

template <typename T, int kBlock>
__global__ void __launch_bounds__(kFusedThreads, 1)
    krylov_cluster_kernel(const __grid_constant__ ClusterArguments<T> arguments) {
  if (arguments.step > 0 && *arguments.flag != kRunning) return;
  constexpr int kSquare = ClusterWork<kBlock>::kSquare;
  ClusterWork<kBlock> work{};
  work.n = arguments.n;
  work.rank = static_cast<int>(cluster_rank());
  const int64_t rows = ceil_div(work.n, kKrylovCluster);
  work.first = min(work.n, rows * work.rank);
  work.end = min(work.n, work.first + rows);
  work.exchange = static_cast<double*>(shared_memory());
  work.norms = work.exchange + 9 * kSquare;
  work.inverse = work.norms + kBlock;
  work.factor = work.inverse + kBlock;
  work.scratch = work.factor + kSquare;

  int step = arguments.step;
  bool goes_on = true;
  if (step == 0) {
    if (work.rank == 0 && threadIdx.x == 0) *arguments.flag = kRunning;
    for (int j = 0; j < kBlock; ++j)
      for (int64_t i = work.first + threadIdx.x; i < work.end; i += kFusedThreads) {
        double value = counter_random(j, i);
        if (j < arguments.start_columns) {
          const double given = static_cast<double>(arguments.start[i * arguments.start_columns + j]);
          if (isfinite(given)) value = given;  // a start is a hint: a broken one costs passes, not the result
        }
        arguments.vectors[j * work.n + i] = value;
      }
    __syncthreads();
  } else if (step == kKrylovSteps) {
    goes_on = rotate_basis(work, arguments) == kRunning;
    step = 1;
  }
  if (goes_on) extend_basis(work, arguments.vectors, arguments.products, step);
  __syncthreads();
  cluster_barrier();  // others may still read the shared memory of this block
}

template <typename T, int kBlock>
void enqueue(const Stream& stream, const KrylovProblem<T>& problem) {
  const int64_t n = problem.n;
  const KrylovFusedPlan plan = plan_krylov_fused(n, problem.k, stream.shared_limit());
  double* vectors = problem.workspace + plan.vectors;
  double* products = problem.workspace + plan.products;
  int* flag = reinterpret_cast<int*>(problem.workspace + plan.flag);
  ClusterArguments<T> arguments{n,
                                problem.k,
                                problem.tol,
                                vectors,
                                products,
                                problem.workspace + plan.ritz_values,
                                problem.workspace + plan.bands,
                                problem.start,
                                problem.start == nullptr ? 0 : problem.start_columns,
                                flag,
                                problem.status,
                                0};
  auto between = [&](int step) {
    arguments.step = step;
    stream.launch_clusters(krylov_cluster_kernel<T, kBlock>, kKrylovCluster, kKrylovCluster, kFusedThreads,
                           plan.cluster_shared_bytes, arguments);
  };
  auto multiply = [&](int64_t step, const int* skip) {
    const int64_t offset = step * kBlock * n, tiles = plan.row_tiles;
    stream.launch(tiles == 1 ? block_product_kernel<T, 1> : block_product_kernel<T, 2>,
                  ceil_div(n, 16 * tiles) * (kBlock / 16), kFusedThreads, tiles * kWarps * 256 * 8,
                  problem.kernel, problem.stride, n, vectors + offset, products + offset, kBlock / 16, skip);
  };
  between(0);
  multiply(0, flag);
  between(1);
  for (int pass = 0; pass < kKrylovPasses; ++pass) {
    multiply(1, flag);
    between(2);
    multiply(2, flag);
    between(kKrylovSteps);
  }
  finish_krylov(
      stream, problem,
      KrylovResult{vectors, products, problem.workspace + plan.ritz_values, problem.workspace + plan.fallback,
                   problem.workspace + plan.fallback_vectors, flag},
      [&] { multiply(0, nullptr); });
}

}  // namespace

template <typename T>
void launch_krylov_fused(const Stream& stream, const KrylovProblem<T>& problem) {
  if (krylov_block(problem.k) == 16)
    enqueue<T, 16>(stream, problem);
  else
    enqueue<T, 32>(stream, problem);
}

template void launch_krylov_fused<float>(const Stream&, const KrylovProblem<float>&);
template void launch_krylov_fused<double>(const Stream&, const KrylovProblem<double>&);

}  // namespace catapult::cuda
