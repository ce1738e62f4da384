// agop += scale G^T G, and <G^T G, H^T H>_F = ||G H^T||_F^2 without forming d x d.
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/tile_product.cuh"

namespace catapult::cuda {

namespace {

// G^T G is the Gram matrix of the rows of G^T: one layer without an A part.
GramLayer transposed_layer(const Agop& problem) {
  GramLayer layer{};
  layer.x.b = layer.z.b = problem.g;
  layer.x.b_stride = layer.z.b_stride = problem.g_column_stride;
  layer.x.b_column_stride = layer.z.b_column_stride = problem.g_stride;
  layer.b_columns = problem.rows;
  layer.scale = problem.scale;
  layer.beta = 1.0;
  return layer;
}

Gram gram_problem(const Agop& problem, const GramLayer* layer) {
  return {problem.dtype,       true, problem.d,      problem.d, 1, layer, 1, problem.agop,
          problem.agop_stride, true, problem.version};
}

template <typename T>
struct InnerArguments {
  MatrixRows<T> g, h;
  int64_t depth, column_tiles;
  double* partials;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    agop_inner_kernel(const __grid_constant__ InnerArguments<T> arguments) {
  MatrixRows<T> g = arguments.g, h = arguments.h;
  g.first = blockIdx.x / arguments.column_tiles * kTile;
  h.first = blockIdx.x % arguments.column_tiles * kTile;
  double total[4][4];
  tile_product<T, 4, 4>(g, h, 0, arguments.depth, total);  // zero beyond the rows of G and H
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) squares += total[i][j] * total[i][j];
  // Behind the tiles: a thread may still be reading those.
  double* slots =
      reinterpret_cast<double*>(static_cast<char*>(shared_memory()) + tile_shared_bytes<T, 4, 4>());
  squares = block_sum(squares, slots);
  if (threadIdx.x == 0) arguments.partials[blockIdx.x] = squares;
}

__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* partials, int64_t count, double* result, int* status) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = block_sum(sum, static_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) {
    *result = sum;
    if (!isfinite(sum)) raise_status(status, kNonFinite);
  }
}

int64_t inner_tiles(const Inner& problem) {
  return ceil_div(problem.g_rows, kTile) * ceil_div(problem.h_rows, kTile);
}

template <typename T>
void launch(const Inner& problem, const Context& context) {
  Stream stream("agop_inner", context.device, context.stream);
  InnerArguments<T> arguments{};
  arguments.g = {
      static_cast<const T*>(problem.g), problem.g_stride, 0, problem.g_column_stride, 1, 0, problem.g_rows};
  arguments.h = {
      static_cast<const T*>(problem.h), problem.h_stride, 0, problem.h_column_stride, 1, 0, problem.h_rows};
  arguments.depth = problem.d;
  arguments.column_tiles = ceil_div(problem.h_rows, kTile);
  arguments.partials = static_cast<double*>(context.workspace);
  stream.launch(agop_inner_kernel<T>, inner_tiles(problem), kThreads,
                tile_shared_bytes<T, 4, 4>() + kReduceSlots * 8, arguments);
  stream.launch(sum_kernel, 1, kThreads, kReduceSlots * 8, static_cast<const double*>(context.workspace),
                inner_tiles(problem), problem.result, context.status);
}

}  // namespace

int64_t agop_reduce_workspace_bytes(const Agop& problem) {
  GramLayer layer = transposed_layer(problem);
  return ntk_gram_workspace_bytes(gram_problem(problem, &layer));
}

void launch_agop_reduce(const Agop& problem, const Context& context) {
  GramLayer layer = transposed_layer(problem);
  launch_ntk_gram("agop_reduce", gram_problem(problem, &layer), context);
}

int64_t agop_inner_workspace_bytes(const Inner& problem) { return inner_tiles(problem) * 8; }

void launch_agop_inner(const Inner& problem, const Context& context) {
  if (problem.dtype == DType::kFloat32)
    launch<float>(problem, context);
  else
    launch<double>(problem, context);
}

}  // namespace catapult::cuda
