// Version "ffma" of ntk_gram: the ordinary units, float32 in short chains, float64 as it is.
#include "cuda/ntk_gram_fast.cuh"

namespace catapult::cuda {

int64_t ntk_gram_fast_workspace_bytes(const Gram& problem) {
  int64_t bytes = 0;
  for_layers(problem, [&](const GramLayer* layers, int count, int64_t) {
    bytes = std::max(bytes, gram_workspace_bytes(plan_fast(problem, layers, count).gram, count,
                                                 item_bytes(problem.dtype)));
  });
  return bytes;
}

void launch_ntk_gram_ffma(const char* op, const Gram& problem, const Context& context) {
  if (problem.dtype == DType::kFloat32)
    launch_gram_fast<Ffma<float, kTile>, Ffma<float, kLargeTile>>(op, problem, context);
  else
    launch_gram_fast<Ffma<double, kTile>, Ffma<double, kTile>>(op, problem, context);
}

}  // namespace catapult::cuda
