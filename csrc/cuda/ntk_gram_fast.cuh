// The kernels of the fast versions of ntk_gram, over an engine of gram_tile.cuh. Where there are enough
// tiles, a block makes one tile of K in one launch. Otherwise the columns of the products are cut into
// parts: a first launch sums each part of each product, a second one adds the parts, in their order, then
// multiplies and sums over the layers.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/gram_tile.cuh"
#include "cuda/ntk_gram.cuh"
#include "cuda/ntk_gram_plan.h"

namespace catapult::cuda {

// engine = product `index` of the tile at (row, column), over the columns [begin, end).
template <typename Engine>
__device__ inline void product(Engine& engine, const TileMemory<Engine>& memory,
                               const GramArguments<typename Engine::Scalar>& arguments, int index,
                               int64_t row, int64_t column, int64_t begin, int64_t end) {
  using T = typename Engine::Scalar;
  const GramLayer& layer = arguments.layers[index / 2];
  tile_sum(engine, memory, factor<T>(layer.x, index, arguments.c, row, arguments.rows),
           factor<T>(layer.z, index, arguments.c, column, arguments.columns), begin, end);
}

// Calls use(e, total) for every element e of the thread, over all columns, of which there may be few.
template <typename Engine, typename Use>
__device__ inline void whole_product(Engine& engine, const TileMemory<Engine>& memory,
                                     const GramArguments<typename Engine::Scalar>& arguments, int index,
                                     int64_t row, int64_t column, const Use& use) {
  using T = typename Engine::Scalar;
  const GramLayer& layer = arguments.layers[index / 2];
  const int64_t depth = product_depth(arguments.layers, index);
  if (depth <= kNarrow) {
    narrow_sum(engine, memory, factor<T>(layer.x, index, arguments.c, row, arguments.rows),
               factor<T>(layer.z, index, arguments.c, column, arguments.columns), depth, use);
    return;
  }
  product(engine, memory, arguments, index, row, column, 0, depth);
#pragma unroll
  for (int e = 0; e < Engine::kElements; ++e) use(e, static_cast<double>(engine.total(e)));
}

template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    gram_tile_kernel(const __grid_constant__ GramArguments<typename Engine::Scalar> arguments) {
  using T = typename Engine::Scalar;
  const TileMemory<Engine> memory;
  Engine engine;
  int64_t row, column;
  tile_origin(arguments, blockIdx.x, Engine::kSide, row, column);
  bool finite = true;
  for (int index = 0; index < 2 * arguments.num_layers; ++index) {
    // What is parked is read by the same thread alone.
    T* parked = memory.park + threadIdx.x;
    const bool first_factor = index % 2 == 0;
    const GramLayer& layer = arguments.layers[index / 2];
    whole_product(engine, memory, arguments, index, row, column, [&](int e, double total) {
      T& value = parked[e * Engine::kThreads];
      value = static_cast<T>(first_factor ? layer.scale * (total + layer.beta)
                                          : static_cast<double>(value) * total);
    });
    if (first_factor) continue;
    // The sum over layers lives in K: a small part of the traffic. A loop that is not unrolled leaves the
    // registers to the sums.
    const bool add = index > 1 || arguments.accumulate, last = index + 1 == 2 * arguments.num_layers;
#pragma unroll 1
    for (int e = 0; e < Engine::kElements; ++e) {
      const int64_t i = row + engine.row(e), j = column + engine.column(e);
      if (i >= arguments.rows || j >= arguments.columns || (arguments.symmetric && j > i)) continue;
      T* target = arguments.kernel + i * arguments.kernel_stride + j;
      T value = parked[e * Engine::kThreads];
      if (add) value += *target;
      *target = value;
      if (!last) continue;
      if (arguments.symmetric && i != j) arguments.kernel[j * arguments.kernel_stride + i] = value;
      finite &= isfinite(static_cast<double>(value));
    }
  }
  if (!finite) raise_status(arguments.status, kNonFinite);
}

// Which product and columns a part is.
template <typename T>
__device__ inline int part_columns(const GramArguments<T>& arguments, int64_t part, int64_t& begin,
                                   int64_t& end) {
  int index = 0;
  while (part >= arguments.plan.first_part[index + 1]) ++index;
  begin = (part - arguments.plan.first_part[index]) * arguments.plan.columns_per_part[index];
  end = min(begin + arguments.plan.columns_per_part[index], product_depth(arguments.layers, index));
  return index;
}

// Split, first launch: block (part, tile).
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    gram_part_kernel(const __grid_constant__ GramArguments<typename Engine::Scalar> arguments) {
  const TileMemory<Engine> memory;
  Engine engine;
  int64_t begin, end, row, column;
  const int index = part_columns(arguments, blockIdx.x / arguments.plan.tiles, begin, end);
  tile_origin(arguments, blockIdx.x % arguments.plan.tiles, Engine::kSide, row, column);
  product(engine, memory, arguments, index, row, column, begin, end);
  auto* partial = arguments.partials + static_cast<int64_t>(blockIdx.x) * Engine::kSide * Engine::kSide;
#pragma unroll
  for (int e = 0; e < Engine::kElements; ++e)
    partial[engine.row(e) * Engine::kSide + engine.column(e)] = engine.total(e);
}

// The same with a cluster of blocks for every (part, tile): each takes a share of the columns, then adds up
// its share of the elements, over the blocks in the order of their ranks.
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    gram_cluster_kernel(const __grid_constant__ GramArguments<typename Engine::Scalar> arguments) {
  using T = typename Engine::Scalar;
  static_assert(Engine::kElements % kClusterBlocks == 0, "every block adds up as many elements");
  constexpr int kShare = Engine::kElements / kClusterBlocks;
  const TileMemory<Engine> memory;
  Engine engine;
  const int64_t cluster = blockIdx.x / kClusterBlocks;
  const int rank = static_cast<int>(cluster_rank());
  int64_t begin, end, row, column;
  const int index = part_columns(arguments, cluster / arguments.plan.tiles, begin, end);
  tile_origin(arguments, cluster % arguments.plan.tiles, Engine::kSide, row, column);
  const int64_t columns = ceil_div(ceil_div(end - begin, kClusterBlocks), Engine::kDepth) * Engine::kDepth;
  begin += rank * columns;
  product(engine, memory, arguments, index, row, column, begin, min(begin + columns, end));
#pragma unroll
  for (int e = 0; e < Engine::kElements; ++e)
    memory.park[e * Engine::kThreads + threadIdx.x] = engine.total(e);
  cluster_barrier();
  T* partial = arguments.partials + cluster * Engine::kSide * Engine::kSide;
#pragma unroll
  for (int share = 0; share < kShare; ++share) {
    const int e = rank * kShare + share;
    const T* parked = memory.park + e * Engine::kThreads + threadIdx.x;
    double sum = 0.0;
#pragma unroll
    for (int block = 0; block < kClusterBlocks; ++block)
      sum += static_cast<double>(load_from_block(parked, block));
    partial[engine.row(e) * Engine::kSide + engine.column(e)] = static_cast<T>(sum);
  }
  cluster_barrier();  // nobody ends while others read
}

// Split, second launch: one thread per element of a tile.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gram_combine_kernel(const __grid_constant__ GramArguments<T> arguments) {
  constexpr int kBlocksPerTile = kTile * kTile / kThreads;
  const int64_t tile = blockIdx.x / kBlocksPerTile;
  const int element = static_cast<int>(blockIdx.x % kBlocksPerTile) * kThreads + threadIdx.x;
  int64_t row, column;
  tile_origin(arguments, tile, kTile, row, column);
  row += element / kTile;
  column += element % kTile;

  auto total = [&](int index) {
    const int64_t depth = product_depth(arguments.layers, index);
    double sum = 0.0;
    if (depth <= kNarrow) {
      const GramLayer& layer = arguments.layers[index / 2];
      const MatrixRows<T> x = factor<T>(layer.x, index, arguments.c, row, arguments.rows);
      const MatrixRows<T> z = factor<T>(layer.z, index, arguments.c, column, arguments.columns);
      const typename MatrixRows<T>::Row x_row = x.row(0), z_row = z.row(0);
      for (int64_t k = 0; k < depth; ++k)
        sum += static_cast<double>(x.at(x_row, k)) * static_cast<double>(z.at(z_row, k));
      return sum;
    }
    // The loads do not wait for each other; the sum has one order.
#pragma unroll 8
    for (int64_t part = arguments.plan.first_part[index]; part < arguments.plan.first_part[index + 1]; ++part)
      sum += static_cast<double>(
          arguments.partials[(part * arguments.plan.tiles + tile) * kTile * kTile + element]);
    return sum;
  };
  double sum = 0.0;
  for (int l = 0; l < arguments.num_layers; ++l)
    sum += arguments.layers[l].scale * (total(2 * l) + arguments.layers[l].beta) * total(2 * l + 1);
  if (!store(arguments, row, column, sum)) raise_status(arguments.status, kNonFinite);
}

inline FastGramPlan plan_fast(const Gram& problem, const GramLayer* layers, int count) {
  int64_t a_columns[kMaxTerms], b_columns[kMaxTerms];
  for (int l = 0; l < count; ++l) {
    a_columns[l] = layers[l].a_columns;
    b_columns[l] = layers[l].b_columns;
  }
  return plan_gram_fast(problem.n * problem.c, problem.m * problem.c, problem.symmetric, a_columns, b_columns,
                        count, problem.dtype == DType::kFloat32,
                        problem.version == kGramCluster ? kClusterBlocks : 1);
}

// Large: the engine for tiles of kLargeTile; the same as Small where there is none. kClusters: the version of
// that name. At least one layer.
template <typename Small, typename Large, bool kClusters = false>
void launch_gram_fast(const char* op, const Gram& problem, const Context& context) {
  using T = typename Small::Scalar;
  Stream stream(op, context.device, context.stream);
  for_layers(problem, [&](const GramLayer* layers, int count, int64_t first) {
    const FastGramPlan plan = plan_fast(problem, layers, count);
    const GramArguments<T> arguments = gram_arguments<T>(problem, context, layers, count, first, plan.gram);
    const int64_t tiles = plan.gram.tiles, parts = plan.gram.parts(count);
    if (!plan.gram.split && plan.side == kTile) {
      stream.launch(gram_tile_kernel<Small>, tiles, Small::kThreads, TileMemory<Small>::bytes(true),
                    arguments);
      return;
    }
    if (!plan.gram.split) {
      stream.launch(gram_tile_kernel<Large>, tiles, Large::kThreads, TileMemory<Large>::bytes(true),
                    arguments);
      return;
    }
    if constexpr (kClusters)
      stream.launch_clusters(gram_cluster_kernel<Small>, parts * tiles * kClusterBlocks, kClusterBlocks,
                             Small::kThreads, TileMemory<Small>::bytes(true), arguments);
    else
      stream.launch(gram_part_kernel<Small>, parts * tiles, Small::kThreads, TileMemory<Small>::bytes(false),
                    arguments);
    stream.launch(gram_combine_kernel<T>, tiles * (kTile * kTile / kThreads), kThreads, 0, arguments);
  });
}

}  // namespace catapult::cuda
