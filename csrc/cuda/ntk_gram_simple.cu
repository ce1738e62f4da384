// The simplest version of ntk_gram: 4 x 4 elements a thread, one stage of columns. Both products of a tile
// are finished before they are multiplied; K is touched once per launch of up to kMaxTerms layers.
#include <algorithm>

#include "cuda/ntk_gram.cuh"

namespace catapult::cuda {

namespace {

// Product 2 l (A) or 2 l + 1 (B) over the columns [begin, end).
template <typename T>
__device__ void product(const GramArguments<T>& arguments, int index, int64_t row, int64_t column,
                        int64_t begin, int64_t end, double (&total)[4][4]) {
  const GramLayer& layer = arguments.layers[index / 2];
  tile_product<T, 4, 4>(factor<T>(layer.x, index, arguments.c, row, arguments.rows),
                        factor<T>(layer.z, index, arguments.c, column, arguments.columns), begin, end, total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ntk_gram_kernel(const __grid_constant__ GramArguments<T> arguments) {
  int64_t row, column;
  tile_origin(arguments, blockIdx.x, kTile, row, column);
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
  const int64_t depth = product_depth(arguments.layers, index);
  const int64_t begin = (part - arguments.plan.first_part[index]) * arguments.plan.columns_per_part[index];
  const int64_t end = min(begin + arguments.plan.columns_per_part[index], depth);

  int64_t row, column;
  tile_origin(arguments, tile, kTile, row, column);
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
  tile_origin(arguments, tile, kTile, row, column);
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

GramPlan plan_layers(const Gram& problem, const GramLayer* layers, int count) {
  int64_t a_columns[kMaxTerms], b_columns[kMaxTerms];
  for (int l = 0; l < count; ++l) {
    a_columns[l] = layers[l].a_columns;
    b_columns[l] = layers[l].b_columns;
  }
  return plan_gram(problem.n * problem.c, problem.m * problem.c, problem.symmetric, a_columns, b_columns,
                   count);
}

template <typename T>
void launch(const char* op, const Gram& problem, const Context& context) {
  Stream stream(op, context.device, context.stream);
  for_layers(problem, [&](const GramLayer* layers, int count, int64_t first) {
    const GramPlan plan = plan_layers(problem, layers, count);
    const GramArguments<T> arguments = gram_arguments<T>(problem, context, layers, count, first, plan);
    const int64_t tiles = plan.tiles, shared = tile_shared_bytes<T, 4, 4>();
    if (plan.split) {
      stream.launch(ntk_gram_partial_kernel<T>, plan.parts(count) * tiles, kThreads, shared, arguments);
      stream.launch(ntk_gram_combine_kernel<T>, tiles * (kTile * kTile / kThreads), kThreads, 0, arguments);
    } else {
      stream.launch(ntk_gram_kernel<T>, tiles, kThreads, shared, arguments);
    }
  });
}

}  // namespace

int64_t ntk_gram_simple_workspace_bytes(const Gram& problem) {
  int64_t bytes = 0;
  for_layers(problem, [&](const GramLayer* layers, int count, int64_t) {
    bytes = std::max(
        bytes, gram_workspace_bytes(plan_layers(problem, layers, count), count, item_bytes(problem.dtype)));
  });
  return bytes;
}

void launch_ntk_gram_simple(const char* op, const Gram& problem, const Context& context) {
  if (problem.dtype == DType::kFloat32)
    launch<float>(op, problem, context);
  else
    launch<double>(op, problem, context);
}

}  // namespace catapult::cuda
