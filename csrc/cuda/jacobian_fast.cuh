// The kernels of the fast versions of jacobian_conv2d, over an engine of gram_tile.cuh. Two launches for
// every tile of the weight: the gradients G of all samples, a matrix product for each sample whose factors
// are the sensitivities and the patches of the input, read where they lie; then K += G G^T, and beside it
// grad += G^T w.
#pragma once

#include "cuda/gram_tile.cuh"
#include "cuda/jacobian_accumulate.cuh"
#include "cuda/jacobian_plan.h"
#include "cuda/launch.h"

namespace catapult::cuda {

// An image of one sample as a matrix: taps (channel, kh, kw) as rows, output positions as columns, zero
// padding. The sensitivities are the image of a 1 x 1 kernel.
template <typename T>
struct Patches {
  const T* data;
  int64_t channel_stride, height_stride, width_stride;
  int height, width, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool flat;              // a matrix with strides: 1 x 1, no padding, positions equally far apart
  int64_t column_stride;  // of that matrix
};

// Rows of Patches as they are copied to the stages of a block, like TileRows.
template <typename Engine>
struct PatchRows {
  using T = typename Engine::Scalar;
  struct Tap {
    int h, w;  // relative to the position (0, 0)
  };
  static constexpr int64_t kTapBytes = 2 * Engine::kSide * sizeof(Tap);  // of both factors
  static_assert(Engine::kThreads % Engine::kDepth == 0, "a thread copies one column of a stage");

  const Patches<T>& patches;  // a kernel argument
  const T* data;              // of the sample
  int64_t* offsets;           // [kSide], in shared memory
  Tap* taps;                  // [kSide], in shared memory
  TileRows<Engine> matrix;

  // Rows [first, rows) of the sample at `data`. Fills offsets and taps, which are read behind the next
  // barrier.
  __device__ PatchRows(const Patches<T>& patches, const T* data, int64_t first, int64_t rows,
                       int64_t* offsets, Tap* taps)
      : patches(patches),
        data(data),
        offsets(offsets),
        taps(taps),
        matrix({data, patches.channel_stride, 0, patches.column_stride, 1, first, rows}, offsets) {
    if (patches.flat) return;
    const int kernel = patches.kernel_h * patches.kernel_w;
    for (int r = threadIdx.x; r < Engine::kSide; r += Engine::kThreads) {  // as TileRows distributes them
      const int64_t index = first + r;
      if (index >= rows) continue;
      const int tap = static_cast<int>(index % kernel);
      const int h = tap / patches.kernel_w * patches.dilation_h - patches.pad_h;
      const int w = tap % patches.kernel_w * patches.dilation_w - patches.pad_w;
      taps[r] = {h, w};
      offsets[r] =
          index / kernel * patches.channel_stride + h * patches.height_stride + w * patches.width_stride;
    }
  }

  __device__ void copy(T* stage, int64_t k0, int64_t end) const {
    if (patches.flat) {
      matrix.copy(stage, k0, end);
      return;
    }
    const int k = threadIdx.x % Engine::kDepth, position = static_cast<int>(k0) + k;
    const int h = position / patches.out_width * patches.stride_h;
    const int w = position % patches.out_width * patches.stride_w;
    const int64_t offset = h * patches.height_stride + w * patches.width_stride;
    const bool exists = position < end;
#pragma unroll 2  // more addresses at a time would take registers from the sums
    for (int r = threadIdx.x / Engine::kDepth; r < Engine::kSide; r += Engine::kThreads / Engine::kDepth) {
      const int64_t row = offsets[r];
      bool inside = exists && row != TileRows<Engine>::kNoRow;
      if (inside) {
        const Tap tap = taps[r];
        inside = static_cast<unsigned>(h + tap.h) < static_cast<unsigned>(patches.height) &&
                 static_cast<unsigned>(w + tap.w) < static_cast<unsigned>(patches.width);
      }
      copy_async<sizeof(T)>(stage + r * Engine::kLine + k, inside ? data + row + offset : data,
                            inside ? static_cast<int>(sizeof(T)) : 0);
    }
  }
};

template <typename T>
struct GradientTileArguments {
  Patches<T> channels, patches;  // of sample 0, output 0, first row and group of the tile
  int64_t c, b_sample_stride, b_output_stride, b_group_stride, input_sample_stride, input_group_stride;
  int64_t positions;
  int64_t groups, rows, first_tap, taps;  // of the tile
  int64_t row_tiles, tap_tiles;
  double scale;
  T* gradients;  // [n c, groups, rows, taps]
  int64_t gradients_stride;
};

// Block (sample and output, group, row tile, tap tile).
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    gradient_tile_kernel(const __grid_constant__ GradientTileArguments<typename Engine::Scalar> a) {
  using T = typename Engine::Scalar;
  using Rows = PatchRows<Engine>;
  const TileMemory<Engine> memory;
  Engine engine;
  int64_t block = blockIdx.x;
  const int64_t tap = block % a.tap_tiles * Engine::kSide;
  block /= a.tap_tiles;
  const int64_t row = block % a.row_tiles * Engine::kSide;
  block /= a.row_tiles;
  const int64_t group = block % a.groups, sample = block / a.groups;  // i c + j
  typename Rows::Tap* taps = reinterpret_cast<typename Rows::Tap*>(memory.park);
  {
    const int64_t i = sample / a.c, j = sample % a.c;
    const Rows x(a.channels,
                 a.channels.data + i * a.b_sample_stride + j * a.b_output_stride + group * a.b_group_stride,
                 row, a.rows, memory.offsets, taps);
    const Rows y(a.patches, a.patches.data + i * a.input_sample_stride + group * a.input_group_stride,
                 a.first_tap + tap, a.first_tap + a.taps, memory.offsets + Engine::kSide,
                 taps + Engine::kSide);
    stream_columns(engine, memory, x, y, 0, a.positions);
  }
  T* gradients = a.gradients + sample * a.gradients_stride + group * a.rows * a.taps;
#pragma unroll
  for (int e = 0; e < Engine::kElements; ++e) {
    const int64_t i = row + engine.row(e), j = tap + engine.column(e);
    if (i < a.rows && j < a.taps)
      gradients[i * a.taps + j] = static_cast<T>(a.scale * static_cast<double>(engine.total(e)));
  }
}

template <typename T>
struct AccumulateArguments {
  const T* gradients;  // [samples, columns]
  int64_t gradients_stride, samples, columns;
  int64_t tiles, columns_per_part, blocks;  // of G G^T; the blocks behind them do G^T w
  T* partials;                              // [part, tile, kSide, kSide] sums so far, or nullptr: into K
  bool first;                               // nothing is in the partials yet
  T* kernel;                                // [samples, samples]
  int64_t kernel_stride;
  const T* weight;  // [samples]
  int64_t weight_stride;
  T* grad;                    // first weight of the tile, or nullptr
  int64_t taps, grad_stride;  // of the tile, of a row of the weight
  int* status;
};

// K[row, column] += value and its mirror image, from the lower triangle alone.
template <typename T>
__device__ inline void add_to_kernel(const AccumulateArguments<T>& a, int64_t row, int64_t column,
                                     double value) {
  if (row >= a.samples || column > row) return;
  T* target = a.kernel + row * a.kernel_stride + column;
  const T sum = static_cast<T>(static_cast<double>(*target) + value);
  *target = sum;
  a.kernel[column * a.kernel_stride + row] = sum;
  if (!isfinite(static_cast<double>(sum))) raise_status(a.status, kNonFinite);
}

// One thread per column of G.
template <typename T>
__device__ inline void add_to_grad(const AccumulateArguments<T>& a, int64_t column) {
  if (column >= a.columns) return;
  double sum = 0.0;
#pragma unroll 8  // the loads do not wait for each other
  for (int64_t row = 0; row < a.samples; ++row)
    sum += static_cast<double>(a.weight[row * a.weight_stride]) *
           static_cast<double>(a.gradients[row * a.gradients_stride + column]);
  T* target = a.grad + column / a.taps * a.grad_stride + column % a.taps;
  const T rounded = static_cast<T>(static_cast<double>(*target) + sum);
  *target = rounded;
  if (!isfinite(static_cast<double>(rounded))) raise_status(a.status, kNonFinite);
}

// Block (part, tile), then blocks of columns.
template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    accumulate_kernel(const __grid_constant__ AccumulateArguments<typename Engine::Scalar> a) {
  using T = typename Engine::Scalar;
  if (blockIdx.x >= a.blocks) {
    add_to_grad(a, (blockIdx.x - a.blocks) * Engine::kThreads + threadIdx.x);
    return;
  }
  const TileMemory<Engine> memory;
  Engine engine;
  const int64_t part = blockIdx.x / a.tiles, begin = part * a.columns_per_part;
  const int64_t end = min(begin + a.columns_per_part, a.columns);
  if (begin >= end && !a.first) return;
  int64_t row, column;
  triangle_tile(blockIdx.x % a.tiles, row, column);
  row *= Engine::kSide;
  column *= Engine::kSide;
  tile_sum(engine, memory, MatrixRows<T>{a.gradients, a.gradients_stride, 0, 1, 1, row, a.samples},
           MatrixRows<T>{a.gradients, a.gradients_stride, 0, 1, 1, column, a.samples}, begin, end);
  if (a.partials == nullptr) {
#pragma unroll
    for (int e = 0; e < Engine::kElements; ++e)
      add_to_kernel(a, row + engine.row(e), column + engine.column(e), static_cast<double>(engine.total(e)));
    return;
  }
  T* partial = a.partials + static_cast<int64_t>(blockIdx.x) * Engine::kSide * Engine::kSide;
#pragma unroll
  for (int e = 0; e < Engine::kElements; ++e) {
    T* target = partial + engine.row(e) * Engine::kSide + engine.column(e);
    *target = a.first ? engine.total(e) : *target + engine.total(e);
  }
}

// One thread per element of a tile of kTile: adds up its parts, in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    accumulate_parts_kernel(const __grid_constant__ AccumulateArguments<T> a) {
  constexpr int kBlocksPerTile = kTile * kTile / kThreads;
  const int64_t tile = blockIdx.x / kBlocksPerTile;
  const int element = static_cast<int>(blockIdx.x % kBlocksPerTile) * kThreads + threadIdx.x;
  int64_t row, column;
  triangle_tile(tile, row, column);
  double sum = 0.0;
#pragma unroll 8
  for (int64_t block = tile; block < a.blocks; block += a.tiles)
    sum += static_cast<double>(a.partials[block * kTile * kTile + element]);
  add_to_kernel(a, row * kTile + element / kTile, column * kTile + element % kTile, sum);
}

inline GradientSweep plan_gradient_sweep(const JacobianConv2d& problem) {
  return plan_gradient_sweep(problem.n * problem.c, problem.groups, problem.out / problem.groups,
                             problem.in / problem.groups * problem.kernel_h * problem.kernel_w,
                             item_bytes(problem.dtype), problem.tile_bytes);
}

// Distance of the gradients of two samples: they begin at 16 bytes.
inline int64_t gradients_stride(const GradientSweep& sweep) { return ceil_div(sweep.columns(), 4) * 4; }

// Large: the engine for blocks of kLargeTile; the same as Small where there is none.
template <typename Small, typename Large>
int64_t conv_fast_workspace_bytes(const JacobianConv2d& problem) {
  const GradientSweep sweep = plan_gradient_sweep(problem);
  const AccumulatePlan accumulate = plan_accumulate(sweep, Large::kSide != Small::kSide);
  return (sweep.samples * gradients_stride(sweep) + accumulate.partial_elements()) *
         item_bytes(problem.dtype);
}

template <typename T>
Patches<T> image(const void* data, const int64_t* strides, int64_t height, int64_t width) {
  Patches<T> patches{};
  patches.data = static_cast<const T*>(data);
  patches.channel_stride = strides[0];
  patches.height_stride = strides[1];
  patches.width_stride = strides[2];
  patches.height = static_cast<int>(height);
  patches.width = static_cast<int>(width);
  patches.kernel_h = patches.kernel_w = patches.stride_h = patches.stride_w = 1;
  patches.dilation_h = patches.dilation_w = 1;
  return patches;
}

// Sets what follows from the other fields.
template <typename T>
void find_flat(Patches<T>& patches, int64_t out_height, int64_t out_width) {
  patches.out_width = static_cast<int>(out_width);
  const int64_t down = patches.stride_h * patches.height_stride;
  const int64_t across = patches.stride_w * patches.width_stride;
  const bool one = patches.kernel_h * patches.kernel_w == 1 && patches.pad_h == 0 && patches.pad_w == 0;
  patches.flat = one && (out_width == 1 || out_height == 1 || down == out_width * across);
  patches.column_stride = out_width == 1 ? down : across;
}

// Names an engine for a generic lambda.
template <typename E>
struct Use {
  using Engine = E;
};

template <typename Small, typename Large>
void launch_conv_fast(const JacobianConv2d& problem, const Context& context) {
  using T = typename Small::Scalar;
  constexpr bool kLargeTiles = Large::kSide != Small::kSide;
  const Stream stream("jacobian_accumulate", context.device, context.stream);
  const GradientSweep sweep = plan_gradient_sweep(problem);
  const AccumulatePlan plan = plan_accumulate(sweep, kLargeTiles);

  GradientTileArguments<T> g{};
  g.c = problem.c;
  g.b_sample_stride = problem.b_strides[0];
  g.b_output_stride = problem.b_strides[1];
  g.b_group_stride = sweep.rows * problem.b_strides[2];
  g.input_sample_stride = problem.input_strides[0];
  g.input_group_stride = problem.in / problem.groups * problem.input_strides[1];
  g.positions = problem.out_height * problem.out_width;
  g.scale = problem.scale;
  g.gradients = static_cast<T*>(context.workspace);
  g.gradients_stride = gradients_stride(sweep);
  const Patches<T> channels =
      image<T>(problem.b, problem.b_strides + 2, problem.out_height, problem.out_width);
  Patches<T> patches = image<T>(problem.input, problem.input_strides + 1, problem.height, problem.width);
  auto narrow = [](int64_t value) { return static_cast<int>(value); };
  patches.kernel_h = narrow(problem.kernel_h);
  patches.kernel_w = narrow(problem.kernel_w);
  patches.stride_h = narrow(problem.stride_h);
  patches.stride_w = narrow(problem.stride_w);
  patches.pad_h = narrow(problem.pad_h);
  patches.pad_w = narrow(problem.pad_w);
  patches.dilation_h = narrow(problem.dilation_h);
  patches.dilation_w = narrow(problem.dilation_w);
  g.channels = channels;
  g.patches = patches;
  find_flat(g.channels, problem.out_height, problem.out_width);
  find_flat(g.patches, problem.out_height, problem.out_width);

  AccumulateArguments<T> k{};
  k.gradients = g.gradients;
  k.gradients_stride = g.gradients_stride;
  k.samples = sweep.samples;
  k.tiles = plan.tiles;
  k.blocks = plan.parts * plan.tiles;
  k.partials = plan.parts == 1 ? nullptr : g.gradients + sweep.samples * g.gradients_stride;
  k.first = true;
  k.kernel = static_cast<T*>(problem.kernel);
  k.kernel_stride = problem.kernel_stride;
  k.weight = static_cast<const T*>(problem.weight);
  k.weight_stride = problem.weight_stride;
  k.grad_stride = sweep.taps;
  k.status = context.status;

  auto launch_gradients = [&](auto use) {
    using Engine = typename decltype(use)::Engine;
    g.row_tiles = ceil_div(g.rows, Engine::kSide);
    g.tap_tiles = ceil_div(g.taps, Engine::kSide);
    stream.launch(gradient_tile_kernel<Engine>, sweep.samples * g.groups * g.row_tiles * g.tap_tiles,
                  Engine::kThreads, TileMemory<Engine>::bytes(false) + PatchRows<Engine>::kTapBytes, g);
  };
  auto launch_accumulate = [&](auto use) {
    using Engine = typename decltype(use)::Engine;
    const int64_t columns = k.grad == nullptr ? 0 : k.columns;
    stream.launch(accumulate_kernel<Engine>, k.blocks + ceil_div(columns, Engine::kThreads), Engine::kThreads,
                  TileMemory<Engine>::bytes(false), k);
  };
  for (int64_t group = 0; group < problem.groups; group += sweep.tile_groups) {
    g.groups = std::min(sweep.tile_groups, problem.groups - group);
    for (int64_t row = 0; row < sweep.rows; row += sweep.tile_rows) {
      g.rows = std::min(sweep.tile_rows, sweep.rows - row);
      for (int64_t tap = 0; tap < sweep.taps; tap += sweep.tile_taps) {
        g.first_tap = tap;
        g.taps = std::min(sweep.tile_taps, sweep.taps - tap);
        g.channels.data = channels.data + group * g.b_group_stride + row * channels.channel_stride;
        g.patches.data = patches.data + group * g.input_group_stride;
        k.columns = g.groups * g.rows * g.taps;
        k.columns_per_part = plan.columns_per_part(k.columns);
        k.taps = g.taps;
        k.grad = problem.grad == nullptr || problem.weight == nullptr
                     ? nullptr
                     : static_cast<T*>(problem.grad) + (group * sweep.rows + row) * sweep.taps + tap;
        if (gradient_side(sweep, g.rows, g.taps, kLargeTiles) == kTile)
          launch_gradients(Use<Small>{});
        else
          launch_gradients(Use<Large>{});
        if (plan.side == kTile)
          launch_accumulate(Use<Small>{});
        else
          launch_accumulate(Use<Large>{});
        k.first = false;
      }
    }
  }
  if (k.partials != nullptr)
    stream.launch(accumulate_parts_kernel<T>, k.tiles * (kTile * kTile / kThreads), kThreads, 0, k);
}

}  // namespace catapult::cuda
