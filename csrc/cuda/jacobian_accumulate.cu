// K += G G^T and grad += G^T w, for a tile G of per-sample gradients that is given, or that is made
// here from the input and the sensitivities of a convolution (or of a Linear over positions).
#include "cuda/jacobian_accumulate.cuh"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/tile_product.cuh"

namespace catapult::cuda {

namespace {

// grad[column] += sum_row weight[row] G[row, column], summed in double, one thread per column.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const T* tile, int64_t stride, int64_t column_stride, int64_t rows, int64_t columns,
                        const T* weight, int64_t weight_stride, T* grad, int* status) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = static_cast<double>(grad[column]);
  for (int64_t row = 0; row < rows; ++row)
    sum += static_cast<double>(weight[row * weight_stride]) *
           static_cast<double>(tile[row * stride + column * column_stride]);
  grad[column] = static_cast<T>(sum);
  if (!isfinite(static_cast<double>(static_cast<T>(sum)))) raise_status(status, kNonFinite);
}

GramLayer tile_layer(const JacobianTile& problem) {
  GramLayer layer{};  // no A part: scale (0 + 1) B B^T
  layer.x.b = layer.z.b = problem.tile;
  layer.x.b_stride = layer.z.b_stride = problem.tile_stride;
  layer.x.b_column_stride = layer.z.b_column_stride = problem.tile_column_stride;
  layer.b_columns = problem.columns;
  layer.scale = layer.beta = 1.0;
  return layer;
}

Gram gram_problem(const JacobianTile& problem, const GramLayer* layer) {
  return {problem.dtype,         true, problem.rows,   problem.rows, 1, layer, 1, problem.kernel,
          problem.kernel_stride, true, problem.version};
}

template <typename T>
void launch_weighted_sum(const JacobianTile& problem, const Context& context) {
  Stream stream("jacobian_accumulate", context.device, context.stream);
  stream.launch(weighted_sum_kernel<T>, ceil_div(problem.columns, kThreads), kThreads, 0,
                static_cast<const T*>(problem.tile), problem.tile_stride, problem.tile_column_stride,
                problem.rows, problem.columns, static_cast<const T*>(problem.weight), problem.weight_stride,
                static_cast<T*>(problem.grad), context.status);
}

// Output channels of one sample and output as rows, positions as columns.
template <typename T>
struct ChannelRows {
  const T* data;  // first channel of the tile
  int64_t channel_stride, height_stride, width_stride;
  int64_t out_width;
  int64_t rows;

  using Row = const T*;
  __device__ bool rows_fastest() const { return channel_stride == 1 && width_stride != 1; }
  __device__ Row row(int r) const { return r < rows ? data + r * channel_stride : nullptr; }
  __device__ T at(Row row, int64_t position) const {
    if (row == nullptr) return T(0);
    const int p = static_cast<int>(position), width = static_cast<int>(out_width);
    return row[(p / width) * height_stride + (p % width) * width_stride];
  }
};

// Taps (input channel, kh, kw) of one sample as rows, output positions as columns; zero padding.
template <typename T>
struct PatchRows {
  const T* data;  // first channel of the group
  int64_t channel_stride, height_stride, width_stride;
  int height, width, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t first, rows;  // first tap of the tile, taps of the group

  struct Row {
    const T* data;
    int h, w;  // of the tap at output position (0, 0)
  };
  __device__ bool rows_fastest() const { return channel_stride == 1 && width_stride != 1; }
  __device__ Row row(int r) const {
    const int64_t index = first + r;
    if (index >= rows) return {nullptr, 0, 0};
    const int taps = kernel_h * kernel_w;
    const int tap = static_cast<int>(index % taps);
    return {data + index / taps * channel_stride, tap / kernel_w * dilation_h - pad_h,
            tap % kernel_w * dilation_w - pad_w};
  }
  __device__ T at(const Row& row, int64_t position) const {
    if (row.data == nullptr) return T(0);
    const int p = static_cast<int>(position);
    const int h = p / out_width * stride_h + row.h, w = p % out_width * stride_w + row.w;
    if (h < 0 || h >= height || w < 0 || w >= width) return T(0);
    return row.data[h * height_stride + w * width_stride];
  }
};

template <typename T>
struct GradientArguments {
  PatchRows<T> patches;     // of sample 0
  ChannelRows<T> channels;  // of sample 0, output 0
  int64_t c, input_sample_stride, b_sample_stride, b_output_stride;
  int64_t positions, channel_tiles, patch_tiles;
  double scale;
  T* gradients;  // [n c, channels, taps]
};

// Block (sample and output, channel tile, tap tile).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_gradient_kernel(const __grid_constant__ GradientArguments<T> arguments) {
  const int64_t tiles = arguments.channel_tiles * arguments.patch_tiles;
  const int64_t row = blockIdx.x / tiles;  // i c + j
  const int64_t channel_tile = blockIdx.x % tiles / arguments.patch_tiles;
  const int64_t patch_tile = blockIdx.x % arguments.patch_tiles;
  const int64_t sample = row / arguments.c, output = row % arguments.c;

  PatchRows<T> patches = arguments.patches;
  patches.data += sample * arguments.input_sample_stride;
  patches.first = patch_tile * kTile;
  ChannelRows<T> channels = arguments.channels;
  channels.data += sample * arguments.b_sample_stride + output * arguments.b_output_stride +
                   channel_tile * kTile * channels.channel_stride;
  channels.rows -= channel_tile * kTile;

  double total[4][4];
  tile_product<T, 4, 4>(channels, patches, 0, arguments.positions, total);

  T* gradients = arguments.gradients + row * arguments.channels.rows * arguments.patches.rows;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t channel = channel_tile * kTile + threadIdx.x / 16 + 16 * i;
      const int64_t tap = patch_tile * kTile + threadIdx.x % 16 + 16 * j;
      if (channel < arguments.channels.rows && tap < arguments.patches.rows)
        gradients[channel * arguments.patches.rows + tap] = static_cast<T>(arguments.scale * total[i][j]);
    }
}

// One sweep over the output channels of the weight, in tiles that never cross a group.
struct Sweep {
  int64_t samples, taps, channels_per_group, tile_channels;
  int64_t gradient_bytes;  // rounded up to 16
};

Sweep plan_sweep(const JacobianConv2d& problem) {
  Sweep sweep{};
  sweep.samples = problem.n * problem.c;
  sweep.taps = problem.in / problem.groups * problem.kernel_h * problem.kernel_w;
  sweep.channels_per_group = problem.out / problem.groups;
  sweep.tile_channels = gradient_tile_rows(sweep.channels_per_group, sweep.taps, sweep.samples,
                                           item_bytes(problem.dtype), problem.tile_bytes);
  sweep.gradient_bytes =
      ceil_div(sweep.samples * sweep.taps * sweep.tile_channels * item_bytes(problem.dtype), 16) * 16;
  return sweep;
}

// The accumulation of `channels` channels whose gradients lie in the workspace.
JacobianTile tile_problem(const JacobianConv2d& problem, const Sweep& sweep, int64_t first, int64_t channels,
                          void* gradients) {
  JacobianTile tile{};
  tile.dtype = problem.dtype;
  tile.rows = sweep.samples;
  tile.columns = channels * sweep.taps;
  tile.tile = gradients;
  tile.tile_stride = tile.columns;
  tile.tile_column_stride = 1;
  tile.kernel = problem.kernel;
  tile.kernel_stride = problem.kernel_stride;
  tile.weight = problem.weight;
  tile.weight_stride = problem.weight_stride;
  if (problem.grad != nullptr)
    tile.grad = static_cast<char*>(problem.grad) + first * sweep.taps * item_bytes(problem.dtype);
  return tile;
}

template <typename T>
void launch_sweep(const JacobianConv2d& problem, const Context& context) {
  const Sweep sweep = plan_sweep(problem);
  Stream stream("jacobian_accumulate", context.device, context.stream);
  Context inner = context;
  inner.workspace = static_cast<char*>(context.workspace) + sweep.gradient_bytes;

  GradientArguments<T> arguments{};
  arguments.c = problem.c;
  arguments.input_sample_stride = problem.input_strides[0];
  arguments.b_sample_stride = problem.b_strides[0];
  arguments.b_output_stride = problem.b_strides[1];
  arguments.positions = problem.out_height * problem.out_width;
  arguments.patch_tiles = ceil_div(sweep.taps, kTile);
  arguments.scale = problem.scale;
  arguments.gradients = static_cast<T*>(context.workspace);
  auto narrow = [](int64_t value) { return static_cast<int>(value); };
  for (int64_t group = 0; group < problem.groups; ++group) {
    const int64_t group_first = group * sweep.channels_per_group;
    arguments.patches = {static_cast<const T*>(problem.input) +
                             group * (problem.in / problem.groups) * problem.input_strides[1],
                         problem.input_strides[1],
                         problem.input_strides[2],
                         problem.input_strides[3],
                         narrow(problem.height),
                         narrow(problem.width),
                         narrow(problem.out_width),
                         narrow(problem.kernel_h),
                         narrow(problem.kernel_w),
                         narrow(problem.stride_h),
                         narrow(problem.stride_w),
                         narrow(problem.pad_h),
                         narrow(problem.pad_w),
                         narrow(problem.dilation_h),
                         narrow(problem.dilation_w),
                         0,
                         sweep.taps};
    for (int64_t first = 0; first < sweep.channels_per_group; first += sweep.tile_channels) {
      const int64_t channels = std::min(sweep.tile_channels, sweep.channels_per_group - first);
      arguments.channels = {static_cast<const T*>(problem.b) + (group_first + first) * problem.b_strides[2],
                            problem.b_strides[2],
                            problem.b_strides[3],
                            problem.b_strides[4],
                            problem.out_width,
                            channels};
      arguments.channel_tiles = ceil_div(channels, kTile);
      stream.launch(sample_gradient_kernel<T>,
                    sweep.samples * arguments.channel_tiles * arguments.patch_tiles, kThreads,
                    tile_shared_bytes<T, 4, 4>(), arguments);
      launch_jacobian_tile(tile_problem(problem, sweep, group_first + first, channels, context.workspace),
                           inner);
    }
  }
}

}  // namespace

int64_t jacobian_tile_workspace_bytes(const JacobianTile& problem) {
  GramLayer layer = tile_layer(problem);
  return ntk_gram_workspace_bytes(gram_problem(problem, &layer));
}

void launch_jacobian_tile(const JacobianTile& problem, const Context& context) {
  GramLayer layer = tile_layer(problem);
  launch_ntk_gram("jacobian_accumulate", gram_problem(problem, &layer), context);
  if (problem.grad == nullptr || problem.weight == nullptr) return;
  if (problem.dtype == DType::kFloat32)
    launch_weighted_sum<float>(problem, context);
  else
    launch_weighted_sum<double>(problem, context);
}

int64_t jacobian_conv2d_workspace_bytes(const JacobianConv2d& problem) {
  check_version("jacobian_conv2d", problem.version, kConvVersions);
  if (problem.version == kConvFfma) return conv_ffma_workspace_bytes(problem);
  if (problem.version == kConvTf32x3) return conv_tensor_workspace_bytes(problem);
  const Sweep sweep = plan_sweep(problem);
  int64_t inner = 0;  // a short last tile may split differently from a full one
  const int64_t last = sweep.channels_per_group % sweep.tile_channels;
  for (int64_t channels : {std::min(sweep.tile_channels, sweep.channels_per_group), last})
    inner =
        std::max(inner, jacobian_tile_workspace_bytes(tile_problem(problem, sweep, 0, channels, nullptr)));
  return sweep.gradient_bytes + inner;
}

void launch_jacobian_conv2d(const JacobianConv2d& problem, const Context& context) {
  check_version("jacobian_conv2d", problem.version, kConvVersions);
  if (problem.version == kConvFfma) return launch_conv_ffma(problem, context);
  if (problem.version == kConvTf32x3) return launch_conv_tensor(problem, context);
  if (problem.dtype == DType::kFloat32)
    launch_sweep<float>(problem, context);
  else
    launch_sweep<double>(problem, context);
}

}  // namespace catapult::cuda
