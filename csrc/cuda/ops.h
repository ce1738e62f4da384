// Launchers of every op. They enqueue on the given stream and return: no allocation, no
// synchronisation. Workspaces come from the caller, sized by the *_workspace_bytes functions and
// aligned to 8 bytes. `status` is one int32 on the device to which kernels add bits (device.cuh):
// 1 a NaN or an infinity was written, 2 an eigensolver did not converge, 4 no such sample. Letters as in
// core/types.h. `version` chooses among the implementations of an op: 0 the simplest, the others are named in
// catapult_ext/ops/cuda.py (VERSIONS) in the same order.
#pragma once

#include <cstdint>

#include "core/chain_sgd.h"
#include "core/types.h"

namespace catapult::cuda {

constexpr int64_t item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

struct Context {
  int device;
  std::uintptr_t stream;  // a cudaStream_t
  int* status;            // on the device
  void* workspace;        // on the device; may be nullptr where its size is 0
};

// Strides count elements and may be 0 or negative.
struct GramOperand {
  const void* a;  // [n, a_columns]
  int64_t a_stride, a_column_stride;
  const void* b;  // [n, c, b_columns]
  int64_t b_stride, b_output_stride, b_column_stride;
};

struct GramLayer {
  GramOperand x, z;  // the symmetric kernel has z = x
  int64_t a_columns, b_columns;
  double scale, beta;
};

// K (+)= sum_l scale_l (A_l A'_l^T + beta_l) * (B_l B'_l^T); symmetric: lower triangle computed and
// mirrored (with `accumulate` the lower triangle is read).
struct Gram {
  DType dtype;
  bool symmetric;
  int64_t n, m, c;
  const GramLayer* layers;
  int64_t num_layers;
  void* kernel;  // [n c, m c]
  int64_t kernel_stride;
  bool accumulate;
  int version;
};
int64_t ntk_gram_workspace_bytes(const Gram& problem);
void launch_ntk_gram(const char* op, const Gram& problem, const Context& context);

// K += G G^T and grad += G^T w.
struct JacobianTile {
  DType dtype;
  int64_t rows, columns;
  const void* tile;  // [rows, columns]
  int64_t tile_stride, tile_column_stride;
  void* kernel;  // [rows, rows]
  int64_t kernel_stride;
  const void* weight;  // [rows] or nullptr
  int64_t weight_stride;
  void* grad;   // [columns] contiguous, or nullptr
  int version;  // of the Gram kernel
};
int64_t jacobian_tile_workspace_bytes(const JacobianTile& problem);
void launch_jacobian_tile(const JacobianTile& problem, const Context& context);

// The same for the weight [out, in / groups, kh, kw] of a convolution, whose per-sample gradients
// G [n c, out, in / groups, kh, kw] = scale sum_positions b input are made tile by tile in the
// workspace. A Linear over T positions is the convolution with one 1 x 1 tap and H = T, W = 1.
struct JacobianConv2d {
  DType dtype;
  int64_t n, c, in, height, width, out, out_height, out_width;
  int64_t groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  const void* input;  // [n, in, height, width]
  int64_t input_strides[4];
  const void* b;  // [n, c, out, out_height, out_width]
  int64_t b_strides[5];
  double scale;
  void* kernel;  // [n c, n c]
  int64_t kernel_stride;
  const void* weight;  // [n c] or nullptr
  int64_t weight_stride;
  void* grad;  // [out, in / groups, kh, kw] contiguous, or nullptr
  int64_t tile_bytes;
  int version;
};
int64_t jacobian_conv2d_workspace_bytes(const JacobianConv2d& problem);
void launch_jacobian_conv2d(const JacobianConv2d& problem, const Context& context);

struct Agop {
  DType dtype;
  int64_t rows, d;
  const void* g;  // [rows, d]
  int64_t g_stride, g_column_stride;
  double scale;
  void* agop;  // [d, d], symmetric, accumulated into
  int64_t agop_stride;
  int version;  // of the Gram kernel
};
int64_t agop_reduce_workspace_bytes(const Agop& problem);
void launch_agop_reduce(const Agop& problem, const Context& context);

struct Inner {
  DType dtype;
  int64_t g_rows, h_rows, d;
  const void* g;  // [g_rows, d]
  int64_t g_stride, g_column_stride;
  const void* h;  // [h_rows, d]
  int64_t h_stride, h_column_stride;
  double* result;  // ||G H^T||_F^2, on the device
};
int64_t agop_inner_workspace_bytes(const Inner& problem);
void launch_agop_inner(const Inner& problem, const Context& context);

struct Eigh {
  DType dtype;
  int64_t batch, n, k;
  const void* kernel;  // [batch, n, n], the lower triangle is read; unit stride along columns
  int64_t kernel_batch_stride, kernel_stride;
  const void* start;  // [batch, n, start_columns] contiguous, or nullptr
  int64_t start_columns;
  double tol;       // block Krylov stops when every ||K v - lambda v|| <= tol lambda_1
  void* values;     // [batch, k] descending
  void* vectors;    // [batch, n, k]
  void* residuals;  // [batch, k] ||K v - lambda v|| of what is returned
  int version;
};
int64_t topk_eigh_workspace_bytes(const Eigh& problem, int device);
void launch_topk_eigh(const Eigh& problem, const Context& context);

struct Norm {
  DType dtype;
  int64_t batch, n;
  const void* kernel;  // [batch, n, n], the lower triangle is read; unit stride along columns
  int64_t kernel_batch_stride, kernel_stride;
  double tol;    // relative error bound
  void* values;  // [batch]
  int version;
};
int64_t spectral_norm_workspace_bytes(const Norm& problem, int device);
void launch_spectral_norm(const Norm& problem, const Context& context);

// Steps of core/chain_sgd.h, every one of them enqueued. A step that is not made, and those behind it, leave
// the parameters as they are.
struct ChainSteps {
  DType dtype;
  const ChainLayer* layers;  // the last one has one output; parameters on the device
  int64_t num_layers;
  const void* x;  // [n, in of the first layer]
  int64_t n, x_stride, x_column_stride;
  const void* y;  // [n]
  int64_t y_stride;
  const int64_t* batch_index;  // on the device: samples of all batches, one batch after the other
  const double* rates;         // on the device [steps]
  // On the host, since they decide what is launched.
  const int64_t* batch_sizes;  // [steps], each >= 1
  const int64_t* observed;     // [steps]: whether the kernel of this batch is asked for
  int64_t steps;
  double loss_limit;  // a step whose loss exceeds it is not made
  double tol;         // relative error bound of lambda_1
  void* losses;       // [steps] before each update
  void* lambda_1;     // [steps] of the kernel of the batch before each update, NaN where not observed
  int gram_version, norm_version;  // of ntk_gram and spectral_norm
};
int64_t chain_sgd_workspace_bytes(const ChainSteps& problem, int device);
void launch_chain_sgd(const ChainSteps& problem, const Context& context);

}  // namespace catapult::cuda
