// Versions "tf32x3" and "cluster" of ntk_gram: the tensor cores, float32 as three TF32 products, float64 as
// it is. They differ where the columns are split: "cluster" adds up inside clusters of blocks.
#include "cuda/ntk_gram_fast.cuh"

namespace catapult::cuda {

namespace {

template <bool kClusters>
void launch(const char* op, const Gram& problem, const Context& context) {
  if (problem.dtype == DType::kFloat32)
    launch_gram_fast<Tf32x3<kTile>, Tf32x3<kLargeTile>, kClusters>(op, problem, context);
  else
    launch_gram_fast<Float64, Float64, kClusters>(op, problem, context);
}

}  // namespace

void launch_ntk_gram_tensor(const char* op, const Gram& problem, const Context& context) {
  if (problem.version == kGramCluster)
    launch<true>(op, problem, context);
  else
    launch<false>(op, problem, context);
}

}  // namespace catapult::cuda
