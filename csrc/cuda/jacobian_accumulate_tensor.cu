// Version "tf32x3" of jacobian_conv2d: the tensor cores, float32 as three TF32 products.
#include "cuda/jacobian_fast.cuh"

namespace catapult::cuda {

int64_t conv_tensor_workspace_bytes(const JacobianConv2d& problem) {
  return problem.dtype == DType::kFloat32
             ? conv_fast_workspace_bytes<Tf32x3<kTile>, Tf32x3<kLargeTile>>(problem)
             : conv_fast_workspace_bytes<Float64, Float64>(problem);
}

void launch_conv_tensor(const JacobianConv2d& problem, const Context& context) {
  if (problem.dtype == DType::kFloat32)
    launch_conv_fast<Tf32x3<kTile>, Tf32x3<kLargeTile>>(problem, context);
  else
    launch_conv_fast<Float64, Float64>(problem, context);
}

}  // namespace catapult::cuda
