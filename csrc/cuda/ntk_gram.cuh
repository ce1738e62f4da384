// What every version of ntk_gram shares: the argument of its kernels, where a tile lies, and how its
// elements are written.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/tile_product.cuh"

namespace catapult::cuda {

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
__device__ inline void tile_origin(const GramArguments<T>& arguments, int64_t tile, int side, int64_t& row,
                                   int64_t& column) {
  if (arguments.symmetric) {
    triangle_tile(tile, row, column);
  } else {
    row = tile / arguments.plan.column_tiles;
    column = tile % arguments.plan.column_tiles;
  }
  row *= side;
  column *= side;
}

// Rows from `first` on of the factor of product 2 l (A) or 2 l + 1 (B): `operand` is x of the layer, whose
// samples are the rows of K, or z, whose samples are the columns; `rows` is how many there are.
template <typename T>
__device__ inline MatrixRows<T> factor(const GramOperand& operand, int index, int64_t c, int64_t first,
                                       int64_t rows) {
  if (index % 2 == 0)
    return {static_cast<const T*>(operand.a), operand.a_stride, 0, operand.a_column_stride, c, first, rows};
  return {static_cast<const T*>(operand.b),
          operand.b_stride,
          operand.b_output_stride,
          operand.b_column_stride,
          c,
          first,
          rows};
}

// Columns of product 2 l (A) or 2 l + 1 (B).
__host__ __device__ inline int64_t product_depth(const GramLayer* layers, int index) {
  return index % 2 == 0 ? layers[index / 2].a_columns : layers[index / 2].b_columns;
}

// Writes K[row, column] (and its mirror image). A diagonal tile writes from its lower half alone. Says
// whether what was written is finite.
template <typename T>
__device__ inline bool store(const GramArguments<T>& arguments, int64_t row, int64_t column, double value) {
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

// Calls launch_layers(layers, count, first) for runs of at most kMaxTerms layers, at least once: no layers
// at all still write zeros.
template <typename Launch>
inline void for_layers(const Gram& problem, const Launch& launch_layers) {
  int64_t first = 0;
  do {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTerms, problem.num_layers - first));
    launch_layers(problem.layers + first, count, first);
    first += count;
  } while (first < problem.num_layers);
}

template <typename T>
GramArguments<T> gram_arguments(const Gram& problem, const Context& context, const GramLayer* layers,
                                int count, int64_t first, const GramPlan& plan) {
  GramArguments<T> arguments{};
  std::copy_n(layers, count, arguments.layers);
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
  arguments.plan = plan;
  return arguments;
}

// Versions of ntk_gram, in the order of catapult_ext/ops/cuda.py.
enum GramVersion : int { kGramSimple, kGramFfma, kGramTf32x3, kGramCluster, kGramVersions };

int64_t ntk_gram_simple_workspace_bytes(const Gram& problem);
int64_t ntk_gram_fast_workspace_bytes(const Gram& problem);
void launch_ntk_gram_simple(const char* op, const Gram& problem, const Context& context);
void launch_ntk_gram_ffma(const char* op, const Gram& problem, const Context& context);
void launch_ntk_gram_tensor(const char* op, const Gram& problem, const Context& context);

}  // namespace catapult::cuda
