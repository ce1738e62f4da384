// Version "ffma" of jacobian_conv2d: the ordinary units, float32 in short chains, float64 as it is.
#include "cuda/jacobian_fast.cuh"

namespace catapult::cuda {

int64_t conv_ffma_workspace_bytes(const JacobianConv2d& problem) {
  return problem.dtype == DType::kFloat32
             ? conv_fast_workspace_bytes<Ffma<float, kTile>, Ffma<float, kLargeTile>>(problem)
             : conv_fast_workspace_bytes<Ffma<double, kTile>, Ffma<double, kTile>>(problem);
}

void launch_conv_ffma(const JacobianConv2d& problem, const Context& context) {
  if (problem.dtype == DType::kFloat32)
    launch_conv_fast<Ffma<float, kTile>, Ffma<float, kLargeTile>>(problem, context);
  else
    launch_conv_fast<Ffma<double, kTile>, Ffma<double, kTile>>(problem, context);
}

}  // namespace catapult::cuda
