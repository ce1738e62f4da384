// K (+)= sum_l c_l (A_l A'_l^T + beta_l) * (B_l B'_l^T): the choice of the version. All of them finish both
// products of a tile before they multiply them.
#include <algorithm>

#include "cuda/ntk_gram.cuh"

namespace catapult::cuda {

namespace {

// No layers: nothing but zeros (or what is there) to write, in every version.
bool simple(const Gram& problem) { return problem.version == kGramSimple || problem.num_layers == 0; }

}  // namespace

int64_t ntk_gram_workspace_bytes(const Gram& problem) {
  return simple(problem) ? ntk_gram_simple_workspace_bytes(problem) : ntk_gram_fast_workspace_bytes(problem);
}

void launch_ntk_gram(const char* op, const Gram& problem, const Context& context) {
  check_version(op, problem.version, kGramVersions);
  if (simple(problem))
    launch_ntk_gram_simple(op, problem, context);
  else if (problem.version == kGramFfma)
    launch_ntk_gram_ffma(op, problem, context);
  else
    launch_ntk_gram_tensor(op, problem, context);
}

}  // namespace catapult::cuda
