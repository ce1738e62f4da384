// K (+)= sum_l c_l (A_l A'_l^T + beta_l) * (B_l B'_l^T). Both products of a tile are finished before
// they are multiplied; K is touched once per launch of up to kMaxTerms layers.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/tile_product.cuh"

namespace catapult::cuda {

namespace {

// Everything of one launch; travels as a kernel argument (limit 4 KB).
template <typename T>
struct GramArguments {
  GramLayer layers[kMaxTerms];
  int num_layers;
  bool symmetric, accumulate;
  int64_t rows, columns, c;  // of K, and outputs per sample
  T* kernel;
  int64_t kernel_stride;
  int* status;
  T* partials;  // split: [part, tile, kTile, kTile]
  GramPlan plan;
};
static_assert(sizeof(GramArguments<double>) <= 4096, "limit of kernel arguments");

template <typename T>
__device__ void tile_origin(const GramArguments<T>& arguments, int64_t tile, int64_t& row, int64_t& column) {
  if (arguments.symmetric) {
    triangle_tile(tile, row, column);
  } else {
    row = tile / arguments.plan.column_tiles;
    column = tile % arguments.plan.column_tiles;
  }
  row *= kTile;
  column *= kTile;
}

// Product 2 l (A) or 2 l + 1 (B) over the columns [begin, end).
template <typename T>
__device__ void product(const GramArguments<T>& arguments, int index, int64_t row, int64_t column,
                        int64_t begin, int64_t end, double (&total)[4][4]) {
  const GramLayer& layer = arguments.layers[index / 2];
  MatrixRows<T> x, z;
  if (index % 2 == 0) {
    x = {static_cast<const T*>(layer.x.a),
         layer.x.a_stride,
         0,
         layer.x.a_column_stride,
         arguments.c,
         row,
         arguments.rows};
    z = {static_cast<const T*>(layer.z.a),
         layer.z.a_stride,
         0,
         layer.z.a_column_stride,
         arguments.c,
         column,
         arguments.columns};
  } else {
    x = {static_cast<const T*>(layer.x.b),
         layer.x.b_stride,
         layer.x.b_output_stride,
         layer.x.b_column_stride,
         arguments.c,
         row,
         arguments.rows};
    z = {static_cast<const T*>(layer.z.b),
         layer.z.b_stride,
         layer.z.b_output_stride,
         layer.z.b_column_stride,
         arguments.c,
         column,
         arguments.columns};
  }
  tile_product<T, 4, 4>(x, z, begin, end, total);
}

// Writes K[row, column] (and its mirror image). A diagonal tile writes from its lower half alone.
template <typename T>
__device__ bool store(const GramArguments<T>& arguments, int64_t row, int64_t column, double value) {
  if (row >= arguments.rows || column >= arguments.columns) return true;
  if (arguments.symmetric && column > row) return true;
  T* target = arguments.kernel + row * arguments.kernel_stride + column;
  if (arguments.accumulate) value += static_cast<double>(*target);
  T rounded = static_cast<T>(value);
  *target = rounded;
  if (arguments.symmetric && column != row)
    arguments.kernel[column * arguments.kernel_stride + row] = rounded;
  return isfinite(static_cast<double>(rounded));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ntk_gram_kernel(const __grid_constant__ GramArguments<T> arguments) {
  int64_t row, column;
  tile_origin(arguments, blockIdx.x, row, column);
  T sum[4][4], park[4][4];
  double total[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = T(0);

  for (int l = 0; l < arguments.num_layers; ++l) {
    const double scale = arguments.layers[l].scale, beta = arguments.layers[l].beta;
    product(arguments, 2 * l, row, column, 0, arguments.layers[l].a_columns, total);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) park[i][j] = static_cast<T>(scale * (total[i][j] + beta));
    product(arguments, 2 * l + 1, row, column, 0, arguments.layers[l].b_columns, total);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum[i][j] =
            static_cast<T>(static_cast<double>(sum[i][j]) + static_cast<double>(park[i][j]) * total[i][j]);
  }

  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      finite &= store(arguments, row + threadIdx.x / 16 + 16 * i, column + threadIdx.x % 16 + 16 * j,
                      static_cast<double>(sum[i][j]));
  if (!finite) raise_status(arguments.status, kNonFinite);
}

// Split, first launch: block (part, tile) writes the product of its columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ntk_gram_partial_kernel(const __grid_constant__ GramArguments<T> arguments) {
  const int64_t part = blockIdx.x / arguments.plan.tiles, tile = blockIdx.x % arguments.plan.tiles;
  int index = 0;
  while (part >= arguments.plan.first_part[index + 1]) ++index;
  const GramLayer& layer = arguments.layers[index / 2];
  const int64_t depth = index % 2 == 0 ? layer.a_columns : layer.b_columns;
  const int64_t begin = (part - arguments.plan.first_part[index]) * arguments.plan.columns_per_part[index];
  const int64_t end = min(begin + arguments.plan.columns_per_part[index], depth);

  int64_t row, column;
  tile_origin(arguments, tile, row, column);
  double total[4][4];
  product(arguments, index, row, column, begin, end, total);
  T* partial = arguments.partials + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      partial[(threadIdx.x / 16 + 16 * i) * kTile + threadIdx.x % 16 + 16 * j] = static_cast<T>(total[i][j]);
}

// Split, second launch: one thread per element of a tile sums the parts of A, then those of B, then
// multiplies.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ntk_gram_combine_kernel(const __grid_constant__ GramArguments<T> arguments) {
  constexpr int kBlocksPerTile = kTile * kTile / kThreads;
  const int64_t tile = blockIdx.x / kBlocksPerTile;
  const int element = static_cast<int>(blockIdx.x % kBlocksPerTile) * kThreads + threadIdx.x;
  int64_t row, column;
  tile_origin(arguments, tile, row, column);
  row += element / kTile;
  column += element % kTile;

  auto sum_parts = [&](int index) {
    double sum = 0.0;
    for (int64_t part = arguments.plan.first_part[index]; part < arguments.plan.first_part[index + 1]; ++part)
      sum += static_cast<double>(
          arguments.partials[(part * arguments.plan.tiles + tile) * kTile * kTile + element]);
    return sum;
  };
  double sum = 0.0;
  for (int l = 0; l < arguments.num_layers; ++l)
    sum += arguments.layers[l].scale * (sum_parts(2 * l) + arguments.layers[l].beta) * sum_parts(2 * l + 1);
  if (!store(arguments, row, column, sum)) raise_status(arguments.status, kNonFinite);
}

GramPlan plan_layers(const Gram& problem, int64_t first, int count) {
  int64_t a_columns[kMaxTerms], b_columns[kMaxTerms];
  for (int l = 0; l < count; ++l) {
    a_columns[l] = problem.layers[first + l].a_columns;
    b_columns[l] = problem.layers[first + l].b_columns;
  }
  return plan_gram(problem.n * problem.c, problem.m * problem.c, problem.symmetric, a_columns, b_columns,
                   count);
}

template <typename T>
void launch(const char* op, const Gram& problem, const Context& context) {
  Stream stream(op, context.device, context.stream);
  int64_t first = 0;
  do {  // no layers at all still writes zeros
    const int count = static_cast<int>(std::min<int64_t>(kMaxTerms, problem.num_layers - first));
    GramArguments<T> arguments{};
    std::copy_n(problem.layers + first, count, arguments.layers);
    arguments.num_layers = count;
    arguments.symmetric = problem.symmetric;
    arguments.accumulate = problem.accumulate || first > 0;
    arguments.rows = problem.n * problem.c;
    arguments.columns = problem.m * problem.c;
    arguments.c = problem.c;
    arguments.kernel = static_cast<T*>(problem.kernel);
    arguments.kernel_stride = problem.kernel_stride;
    arguments.status = context.status;
    arguments.partials = static_cast<T*>(context.workspace);
    arguments.plan = plan_layers(problem, first, count);
    const int64_t tiles = arguments.plan.tiles, shared = tile_shared_bytes<T, 4, 4>();
    if (arguments.plan.split) {
      stream.launch(ntk_gram_partial_kernel<T>, arguments.plan.parts(count) * tiles, kThreads, shared,
                    arguments);
      stream.launch(ntk_gram_combine_kernel<T>, tiles * (kTile * kTile / kThreads), kThreads, 0, arguments);
    } else {
      stream.launch(ntk_gram_kernel<T>, tiles, kThreads, shared, arguments);
    }
    first += count;
  } while (first < problem.num_layers);
}

}  // namespace

int64_t ntk_gram_workspace_bytes(const Gram& problem) {
  int64_t bytes = 0;
  for (int64_t first = 0; first < problem.num_layers; first += kMaxTerms) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTerms, problem.num_layers - first));
    bytes = std::max(
        bytes, gram_workspace_bytes(plan_layers(problem, first, count), count, item_bytes(problem.dtype)));
  }
  return bytes;
}

void launch_ntk_gram(const char* op, const Gram& problem, const Context& context) {
  check_version(op, problem.version, 1);
  if (problem.dtype == DType::kFloat32)
    launch<float>(op, problem, context);
  else
    launch<double>(op, problem, context);
}

}  // namespace catapult::cuda
