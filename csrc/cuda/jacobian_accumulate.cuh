// Versions of jacobian_conv2d, in the order of catapult_ext/ops/cuda.py.
#pragma once

#include "cuda/ops.h"

namespace catapult::cuda {

enum ConvVersion : int { kConvSimple, kConvFfma, kConvTf32x3, kConvVersions };

int64_t conv_ffma_workspace_bytes(const JacobianConv2d& problem);
void launch_conv_ffma(const JacobianConv2d& problem, const Context& context);
int64_t conv_tensor_workspace_bytes(const JacobianConv2d& problem);
void launch_conv_tensor(const JacobianConv2d& problem, const Context& context);

}  // namespace catapult::cuda
