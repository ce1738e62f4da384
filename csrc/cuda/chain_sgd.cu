// SGD steps on a chain of Linear layers, all of them enqueued at once: what a step decides (loss above the
// limit, nothing finite) stays on the device, where the updates behind it look at it. A stretch that was
// ended still computes its passes, from parameters that no longer change, so that every launch finds
// what it reads.
#include <algorithm>
#include <set>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ops.h"
#include "cuda/tile_product.cuh"

namespace catapult::cuda {

namespace {

constexpr const char* kOp = "chain_sgd_";
constexpr int kSamples = 8;       // of a batch that share a load of the weight
constexpr int kPullColumns = 32;  // of the weight, one a lane, in a block of the product back
constexpr int kPullGroups = kThreads / kPullColumns;  // of its rows, one a warp
static_assert(kPullGroups == kSamples, "each warp of a block finishes one sample");

// ---- the samples of a batch

template <typename T>
struct GatherArguments {
  const T* x;  // [n, width]
  int64_t n, width, x_stride, x_column_stride;
  const T* y;  // [n]
  int64_t y_stride;
  const int64_t* samples;  // [batch]
  T* a;                    // [batch, width]
  int64_t a_stride;
  T* target;  // [batch]
  T* one;
  int* noted;
  int* status;
};

// One block per sample.
template <typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArguments<T> g) {
  const int64_t sample = g.samples[blockIdx.x];
  const bool exists = sample >= 0 && sample < g.n;
  const T none = static_cast<T>(nan(""));
  for (int64_t k = threadIdx.x; k < g.width; k += kThreads)
    g.a[blockIdx.x * g.a_stride + k] = exists ? g.x[sample * g.x_stride + k * g.x_column_stride] : none;
  if (threadIdx.x != 0) return;
  g.target[blockIdx.x] = exists ? g.y[sample * g.y_stride] : none;
  if (!exists) raise_status(g.status, kNoSuchSample);
  if (blockIdx.x == 0) {
    *g.one = T(1);
    *g.noted = 0;
  }
}

// ---- forward

// sums[r] = <a_r, w> over `width` columns for rows r < kRows; those behind row `rows` - 1 repeat it. A whole
// warp calls it. Each lane sums up to kPromote columns in T.
template <int kRows, typename T>
__device__ void warp_dots(const T* a, int64_t a_stride, int64_t rows, const T* w, int64_t width,
                          double (&sums)[kRows]) {
  const int lane = threadIdx.x % 32;
  const T* row[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    row[r] = a + min(static_cast<int64_t>(r), rows - 1) * a_stride;
    sums[r] = 0.0;
  }
  for (int64_t begin = 0; begin < width; begin += 32 * kPromote) {
    const int64_t end = min(begin + 32 * kPromote, width);
    T chain[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) chain[r] = T(0);
    for (int64_t k = begin + lane; k < end; k += 32) {
      const T value = w[k];
#pragma unroll
      for (int r = 0; r < kRows; ++r) chain[r] += row[r][k] * value;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] += static_cast<double>(chain[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = warp_sum(sums[r]);
}

template <typename T>
struct ForwardArguments {
  int64_t batch, in, out;
  const T* a;  // [batch, in]
  int64_t a_stride;
  const T* weight;  // [out, in]
  int64_t weight_stride;
  const T* bias;  // [out] or nullptr
  double weight_scale, bias_scale, slope;
  T* next;  // [batch, out]
  int64_t next_stride;
};

// One warp per output and kSamples samples.
template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ ForwardArguments<T> f) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t first = task / f.out * kSamples, o = task % f.out;
  if (first >= f.batch) return;  // all lanes
  const int64_t rows = min(static_cast<int64_t>(kSamples), f.batch - first);
  double sums[kSamples];
  warp_dots<kSamples>(f.a + first * f.a_stride, f.a_stride, rows, f.weight + o * f.weight_stride, f.in, sums);
  const double shift = f.bias == nullptr ? 0.0 : f.bias_scale * static_cast<double>(f.bias[o]);
#pragma unroll
  for (int r = 0; r < kSamples; ++r) {
    if (r >= rows || static_cast<int>(threadIdx.x % 32) != r) continue;
    T z = static_cast<T>(f.weight_scale * sums[r] + shift);
    if (z < T(0))
      z = f.slope == 0.0 ? T(0) : static_cast<T>(f.slope) * z;  // NaN stays, -inf too may become 0
    f.next[(first + r) * f.next_stride + o] = z;
  }
}

constexpr int kOutputThreads = 1024;

template <typename T>
struct OutputArguments {
  int64_t batch, in;
  const T* a;  // [batch, in]
  int64_t a_stride;
  const T* weight;  // [in]
  const T* bias;    // [1] or nullptr
  double weight_scale, bias_scale;
  const T* target;  // [batch]
  T* residual;      // [batch] f - y
  T* loss;          // mean of its squares
};

// One block; one warp per sample.
template <typename T>
__global__ void __launch_bounds__(kOutputThreads)
    output_kernel(const __grid_constant__ OutputArguments<T> f) {
  double* slots = static_cast<double*>(shared_memory());
  const double shift = f.bias == nullptr ? 0.0 : f.bias_scale * static_cast<double>(*f.bias);
  double squares = 0.0;
  for (int64_t i = threadIdx.x / 32; i < f.batch; i += kOutputThreads / 32) {
    double sum[1];
    warp_dots<1>(f.a + i * f.a_stride, f.a_stride, 1, f.weight, f.in, sum);
    if (threadIdx.x % 32 != 0) continue;
    const T residual = static_cast<T>(f.weight_scale * sum[0] + shift) - f.target[i];
    f.residual[i] = residual;
    squares += static_cast<double>(residual) * static_cast<double>(residual);
  }
  squares = block_sum(squares, slots);
  if (threadIdx.x == 0) *f.loss = static_cast<T>(squares / static_cast<double>(f.batch));
}

// ---- sensitivities

template <typename T>
struct PullArguments {
  int64_t batch, out, in;  // of the layer above
  const T* b;              // [batch, out] of the layer above
  int64_t b_stride;
  const T* weight;  // [out, in]
  int64_t weight_stride;
  double scale;
  const T* a;  // [batch, in] input of the layer above: its sign is that of the pre-activation
  int64_t a_stride;
  double slope;
  T* below;  // [batch, in]
  int64_t below_stride;
};

// below = (scale B W) * activation', kPullColumns columns of kSamples samples a block. Warp g sums the rows
// g, g + kPullGroups, ... of W, up to kPromote of them in T; then warp g adds up the sums of sample g.
template <typename T>
__global__ void __launch_bounds__(kThreads) pull_kernel(const __grid_constant__ PullArguments<T> p) {
  double* sums = static_cast<double*>(shared_memory());  // [group, sample, column]
  const int64_t column_blocks = ceil_div(p.in, kPullColumns);
  const int64_t first = blockIdx.x / column_blocks * kSamples;
  const int64_t column = blockIdx.x % column_blocks * kPullColumns + threadIdx.x % kPullColumns;
  const int group = threadIdx.x / kPullColumns;
  const int64_t rows = min(static_cast<int64_t>(kSamples), p.batch - first);
  const T* row[kSamples];
  double total[kSamples];
#pragma unroll
  for (int r = 0; r < kSamples; ++r) {
    row[r] = p.b + (first + min(static_cast<int64_t>(r), rows - 1)) * p.b_stride;
    total[r] = 0.0;
  }
  if (column < p.in) {
    for (int64_t begin = group; begin < p.out; begin += kPullGroups * kPromote) {
      const int64_t end = min(begin + kPullGroups * kPromote, p.out);
      T chain[kSamples];
#pragma unroll
      for (int r = 0; r < kSamples; ++r) chain[r] = T(0);
      for (int64_t o = begin; o < end; o += kPullGroups) {
        const T value = p.weight[o * p.weight_stride + column];
#pragma unroll
        for (int r = 0; r < kSamples; ++r) chain[r] += row[r][o] * value;
      }
#pragma unroll
      for (int r = 0; r < kSamples; ++r) total[r] += static_cast<double>(chain[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kSamples; ++r)
    sums[(group * kSamples + r) * kPullColumns + threadIdx.x % kPullColumns] = total[r];
  __syncthreads();
  if (group >= rows || column >= p.in) return;
  double sum = 0.0;
  for (int g = 0; g < kPullGroups; ++g)
    sum += sums[(g * kSamples + group) * kPullColumns + threadIdx.x % kPullColumns];
  T value = static_cast<T>(p.scale * sum);
  if (!(p.a[(first + group) * p.a_stride + column] > T(0)))
    value = p.slope == 0.0 ? T(0) : static_cast<T>(p.slope) * value;
  p.below[(first + group) * p.below_stride + column] = value;
}

// ---- update

// W[o, k] += factor rate sum_i r_i B[i, o] A[i, k]. A bias is the weight of an input that is one.
template <typename T>
struct ParameterUpdate {
  T* weight;  // [out, in]
  int64_t weight_stride, out, in;
  const T* b;  // [batch, out]
  int64_t b_stride;
  const T* a;  // [batch, in]
  int64_t a_stride;
  double factor;
};

template <typename T>
struct UpdateArguments {
  ParameterUpdate<T> parameters[kMaxTerms];
  int64_t first_tile[kMaxTerms + 1];
  int64_t batch;
  const T* residual;
  const double* rate;
  const T* loss;
  const T* lambda_1;          // nullptr: not asked for
  const int* noted;           // status of the kernel of this batch and of lambda_1
  const int* stopped_before;  // nullptr at the first step
  int* stopped_after;         // nullptr: another launch of this step records
  double loss_limit;
  T* recorded_loss;
  T* recorded_lambda_1;
  int* status;
};
static_assert(sizeof(UpdateArguments<double>) <= 4096, "limit of kernel arguments");

// r_i B[i, o]: outputs o as rows, samples i as columns.
template <typename T>
struct WeightedOutputs {
  const T* b;
  int64_t b_stride;
  const T* residual;
  int64_t first, rows;

  using Row = const T*;
  __device__ bool rows_fastest() const { return true; }
  __device__ Row row(int r) const { return first + r < rows ? b + first + r : nullptr; }
  __device__ T at(Row row, int64_t i) const {
    return row == nullptr ? T(0) : residual[i] * row[i * b_stride];
  }
};

// Every block takes the decision by itself; block 0 writes it down for the next step.
template <typename T>
__device__ bool decide(const UpdateArguments<T>& u) {
  const T loss = *u.loss;
  const int noted = *u.noted | (isfinite(static_cast<double>(loss)) ? 0 : kNonFinite);
  const bool stopped = u.stopped_before != nullptr && *u.stopped_before != 0;
  const bool made = !stopped && noted == 0 && static_cast<double>(loss) <= u.loss_limit;
  if (u.stopped_after != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    const T none = static_cast<T>(nan(""));
    const bool known = !stopped && noted == 0;
    *u.recorded_loss = known ? loss : none;
    *u.recorded_lambda_1 = known && u.lambda_1 != nullptr ? *u.lambda_1 : none;
    *u.stopped_after = !made;
    if (!stopped && noted != 0) raise_status(u.status, noted);
  }
  return made;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) update_kernel(const __grid_constant__ UpdateArguments<T> u) {
  if (!decide(u)) return;
  int index = 0;
  while (blockIdx.x >= u.first_tile[index + 1]) ++index;
  const ParameterUpdate<T>& p = u.parameters[index];
  const int64_t tile = blockIdx.x - u.first_tile[index], column_tiles = ceil_div(p.in, kTile);
  const int64_t row = tile / column_tiles * kTile, column = tile % column_tiles * kTile;
  const WeightedOutputs<T> outputs{p.b, p.b_stride, u.residual, row, p.out};
  const MatrixRows<T> inputs{p.a, 1, 0, p.a_stride, 1, column, p.in};
  double total[4][4];
  tile_product<T, 4, 4>(outputs, inputs, 0, u.batch, total);
  const double factor = *u.rate * p.factor;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t o = row + threadIdx.x / 16 + 16 * i, k = column + threadIdx.x % 16 + 16 * j;
      if (o >= p.out || k >= p.in) continue;
      T* weight = p.weight + o * p.weight_stride + k;
      *weight = static_cast<T>(static_cast<double>(*weight) + factor * total[i][j]);
    }
}

// ---- the host's side

// Pieces of the workspace, one behind the other; without one, only counted.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <typename T>
class Chain {
 public:
  Chain(const ChainSteps& problem, void* workspace) : p_(problem), last_(problem.num_layers - 1) {
    Pieces pieces(workspace);
    while (first_ < last_ && !trains(first_)) ++first_;
    const int64_t largest = *std::max_element(p_.batch_sizes, p_.batch_sizes + p_.steps);
    for (int64_t l = 0; l <= last_; ++l) {
      const ChainLayer& layer = p_.layers[l];
      const int64_t a_stride = padded(layer.in), b_stride = padded(layer.out);
      T* a = pieces.take<T>(largest * a_stride);
      const bool has_b = l >= first_ && l < last_;  // that of the last layer is 1
      layers_.push_back({a, a_stride, has_b ? pieces.take<T>(largest * b_stride) : nullptr, b_stride});
    }
    target_ = pieces.take<T>(largest);
    residual_ = pieces.take<T>(largest);
    kernel_ = pieces.take<T>(largest * largest);
    one_ = pieces.take<T>(1);
    loss_ = pieces.take<T>(1);
    lambda_1_ = pieces.take<T>(1);
    noted_ = pieces.take<int>(1);
    stopped_ = pieces.take<int>(2);
    layers_[last_].b = one_;
    layers_[last_].b_stride = 0;
    used_ = pieces.used();
    inner_ = workspace == nullptr ? nullptr : static_cast<char*>(workspace) + used_;
  }

  int64_t workspace_bytes(int device) const {
    int64_t inner = 0;
    for (int64_t batch : std::set<int64_t>(p_.batch_sizes, p_.batch_sizes + p_.steps)) {
      const std::vector<GramLayer> layers = gram_layers();
      inner = std::max({inner, ntk_gram_workspace_bytes(gram(batch, layers)),
                        spectral_norm_workspace_bytes(norm(batch), device)});
    }
    return used_ + inner;
  }

  void launch(const Context& context) const {
    const Stream stream(kOp, context.device, context.stream);
    const int64_t* samples = p_.batch_index;
    for (int64_t s = 0; s < p_.steps; ++s) {
      const int64_t batch = p_.batch_sizes[s];
      forward(stream, context, samples, batch);
      backward(stream, batch);
      if (p_.observed[s] != 0) observe(context, batch);
      update(stream, context, s);
      samples += batch;
    }
  }

 private:
  // A [batch, in] and B = d f / d z [batch, out].
  struct Activations {
    T* a;
    int64_t a_stride;
    T* b;
    int64_t b_stride;
  };

  static int64_t padded(int64_t width) { return ceil_div(width, 4) * 4; }  // rows begin at 16 bytes
  bool trains(int64_t l) const { return p_.layers[l].trains_weight || p_.layers[l].trains_bias; }
  const T* weight(int64_t l) const { return static_cast<const T*>(p_.layers[l].weight); }
  const T* bias(int64_t l) const { return static_cast<const T*>(p_.layers[l].bias); }

  // f, loss and residuals of the batch, and A of every layer
  void forward(const Stream& stream, const Context& context, const int64_t* samples, int64_t batch) const {
    stream.launch(
        gather_kernel<T>, batch, kThreads, 0,
        GatherArguments<T>{static_cast<const T*>(p_.x), p_.n, p_.layers[0].in, p_.x_stride,
                           p_.x_column_stride, static_cast<const T*>(p_.y), p_.y_stride, samples,
                           layers_[0].a, layers_[0].a_stride, target_, one_, noted_, context.status});
    for (int64_t l = 0; l < last_; ++l) {
      const ChainLayer& layer = p_.layers[l];
      const Activations &own = layers_[l], &next = layers_[l + 1];
      const int64_t warps = layer.out * ceil_div(batch, kSamples);
      stream.launch(forward_kernel<T>, ceil_div(warps, kThreads / 32), kThreads, 0,
                    ForwardArguments<T>{batch, layer.in, layer.out, own.a, own.a_stride, weight(l),
                                        layer.weight_stride, bias(l), layer.weight_scale, layer.bias_scale,
                                        layer.slope, next.a, next.a_stride});
    }
    const ChainLayer& layer = p_.layers[last_];
    stream.launch(
        output_kernel<T>, 1, kOutputThreads, kReduceSlots * 8,
        OutputArguments<T>{batch, layer.in, layers_[last_].a, layers_[last_].a_stride, weight(last_),
                           bias(last_), layer.weight_scale, layer.bias_scale, target_, residual_, loss_});
  }

  // B of every layer down to the first that is trained
  void backward(const Stream& stream, int64_t batch) const {
    for (int64_t l = last_ - 1; l >= first_; --l) {
      const ChainLayer& above = p_.layers[l + 1];
      const Activations &own = layers_[l], &next = layers_[l + 1];
      stream.launch(pull_kernel<T>, ceil_div(above.in, kPullColumns) * ceil_div(batch, kSamples), kThreads,
                    kThreads * kSamples * 8,
                    PullArguments<T>{batch, above.out, above.in, next.b, next.b_stride, weight(l + 1),
                                     above.weight_stride, above.weight_scale, next.a, next.a_stride,
                                     p_.layers[l].slope, own.b, own.b_stride});
    }
  }

  std::vector<GramLayer> gram_layers() const {
    std::vector<GramLayer> layers;
    for (int64_t l = first_; l <= last_; ++l) {
      if (!trains(l)) continue;
      const ChainLayer& layer = p_.layers[l];
      GramLayer term{};
      term.x.a = layers_[l].a;
      term.x.a_stride = layers_[l].a_stride;
      term.x.b = layers_[l].b;
      term.x.b_stride = layers_[l].b_stride;
      term.x.a_column_stride = term.x.b_column_stride = 1;
      term.z = term.x;
      term.a_columns = layer.in;
      term.b_columns = layer.out;
      const double weight = layer.trains_weight ? layer.weight_scale : 0.0;
      const double bias = layer.trains_bias ? layer.bias_scale : 0.0;
      if (weight != 0.0) {
        term.scale = weight * weight;
        term.beta = bias / weight * (bias / weight);
      } else {
        term.a_columns = 0;
        term.scale = bias * bias;
        term.beta = 1.0;
      }
      layers.push_back(term);
    }
    return layers;
  }

  Gram gram(int64_t batch, const std::vector<GramLayer>& layers) const {
    Gram gram{};
    gram.dtype = p_.dtype;
    gram.symmetric = true;
    gram.n = gram.m = batch;
    gram.c = 1;
    gram.layers = layers.data();
    gram.num_layers = static_cast<int64_t>(layers.size());
    gram.kernel = kernel_;
    gram.kernel_stride = batch;
    gram.version = p_.gram_version;
    return gram;
  }

  Norm norm(int64_t batch) const {
    Norm norm{};
    norm.dtype = p_.dtype;
    norm.batch = 1;
    norm.n = batch;
    norm.kernel = kernel_;
    norm.kernel_batch_stride = batch * batch;
    norm.kernel_stride = batch;
    norm.tol = p_.tol;
    norm.values = lambda_1_;
    norm.version = p_.norm_version;
    return norm;
  }

  // K of the batch and its largest eigenvalue; what is wrong with them is noted for this step alone
  void observe(const Context& context, int64_t batch) const {
    Context inner = context;
    inner.status = noted_;
    inner.workspace = inner_;
    const std::vector<GramLayer> layers = gram_layers();
    launch_ntk_gram(kOp, gram(batch, layers), inner);
    launch_spectral_norm(norm(batch), inner);
  }

  // parameters += scale sum_i r_i d f_i / d parameters, where the step is made
  void update(const Stream& stream, const Context& context, int64_t s) const {
    std::vector<ParameterUpdate<T>> parameters;
    const double mean = -2.0 / static_cast<double>(p_.batch_sizes[s]);
    for (int64_t l = first_; l <= last_; ++l) {
      const ChainLayer& layer = p_.layers[l];
      const Activations& own = layers_[l];
      if (layer.trains_weight)
        parameters.push_back({static_cast<T*>(layer.weight), layer.weight_stride, layer.out, layer.in, own.b,
                              own.b_stride, own.a, own.a_stride, mean * layer.weight_scale});
      if (layer.trains_bias)
        parameters.push_back({static_cast<T*>(layer.bias), 1, layer.out, 1, own.b, own.b_stride, one_, 0,
                              mean * layer.bias_scale});
    }
    UpdateArguments<T> u{};
    u.batch = p_.batch_sizes[s];
    u.residual = residual_;
    u.rate = p_.rates + s;
    u.loss = loss_;
    u.lambda_1 = p_.observed[s] != 0 ? lambda_1_ : nullptr;
    u.noted = noted_;
    u.stopped_before = s == 0 ? nullptr : stopped_ + s % 2;
    u.stopped_after = stopped_ + (s + 1) % 2;
    u.loss_limit = p_.loss_limit;
    u.recorded_loss = static_cast<T*>(p_.losses) + s;
    u.recorded_lambda_1 = static_cast<T*>(p_.lambda_1) + s;
    u.status = context.status;
    for (size_t first = 0; first < parameters.size(); first += kMaxTerms) {
      const size_t count = std::min<size_t>(kMaxTerms, parameters.size() - first);
      for (size_t i = 0; i < count; ++i) {
        u.parameters[i] = parameters[first + i];
        u.first_tile[i + 1] =
            u.first_tile[i] + ceil_div(u.parameters[i].out, kTile) * ceil_div(u.parameters[i].in, kTile);
      }
      stream.launch(update_kernel<T>, u.first_tile[count], kThreads, tile_shared_bytes<T, 4, 4>(), u);
      u.stopped_after = nullptr;
    }
  }

  const ChainSteps& p_;
  int64_t first_ = 0, last_;  // the lowest layer that is trained, and the output layer
  std::vector<Activations> layers_;
  T *target_, *residual_;  // [batch]
  T* kernel_;              // [batch, batch]
  T *one_, *loss_, *lambda_1_;
  int *noted_, *stopped_;  // stopped_[s % 2]: before step s
  int64_t used_;
  char* inner_;  // workspace of the kernel and of lambda_1
};

}  // namespace

int64_t chain_sgd_workspace_bytes(const ChainSteps& problem, int device) {
  if (problem.steps == 0) return 0;
  return problem.dtype == DType::kFloat32 ? Chain<float>(problem, nullptr).workspace_bytes(device)
                                          : Chain<double>(problem, nullptr).workspace_bytes(device);
}

void launch_chain_sgd(const ChainSteps& problem, const Context& context) {
  if (problem.steps == 0) return;
  if (problem.dtype == DType::kFloat32)
    Chain<float>(problem, context.workspace).launch(context);
  else
    Chain<double>(problem, context.workspace).launch(context);
}

}  // namespace catapult::cuda
