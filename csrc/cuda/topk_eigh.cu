// Chooses between the direct solver and block Krylov by version and size alone.
#include "cuda/fused_plan.h"
#include "cuda/ops.h"
#include "cuda/plans.h"
#include "cuda/topk_eigh.h"

namespace catapult::cuda {

namespace {

enum Version : int { kSimple = 0, kFused = 1, kVersions };

bool fused_direct(const Eigh& problem) { return problem.version == kFused && problem.n <= kFusedLimit; }

bool fused_krylov(const Eigh& problem) {
  return problem.version == kFused && !use_direct(problem.n, problem.k) && use_fused_krylov(problem.k);
}

int64_t shared_limit(const char* op, int device) { return Stream(op, device, 0).shared_limit(); }

template <typename T>
void launch(const Eigh& problem, const Context& context) {
  Stream stream("topk_eigh", context.device, context.stream);
  const T* kernel = static_cast<const T*>(problem.kernel);
  const T* start = static_cast<const T*>(problem.start);
  T* values = static_cast<T*>(problem.values);
  T* vectors = static_cast<T*>(problem.vectors);
  T* residuals = static_cast<T*>(problem.residuals);
  double* workspace = static_cast<double*>(context.workspace);
  const int64_t n = problem.n, k = problem.k;
  if (use_direct(n, k)) {
    const DirectProblem<T> direct{
        problem.batch,         n,      k,       kernel,    problem.kernel_batch_stride,
        problem.kernel_stride, values, vectors, residuals, workspace,
        context.status,        nullptr};
    fused_direct(problem) ? launch_direct_fused(stream, direct) : launch_direct(stream, direct);
    return;
  }
  for (int64_t i = 0; i < problem.batch; ++i) {  // in stream order: they share the workspace
    const KrylovProblem<T> krylov{n,
                                  k,
                                  kernel + i * problem.kernel_batch_stride,
                                  problem.kernel_stride,
                                  start == nullptr ? nullptr : start + i * n * problem.start_columns,
                                  problem.start_columns,
                                  problem.tol,
                                  values + i * k,
                                  vectors + i * n * k,
                                  residuals + i * k,
                                  workspace,
                                  context.status};
    fused_krylov(problem) ? launch_krylov_fused(stream, krylov) : launch_krylov(stream, context, krylov);
  }
}

}  // namespace

int64_t topk_eigh_workspace_bytes(const Eigh& problem, int device) {
  if (problem.batch == 0 || problem.n == 0 || problem.k == 0) return 0;
  const int64_t limit = shared_limit("topk_eigh", device);
  if (fused_direct(problem))
    return 8 * problem.batch * plan_fused(problem.n, problem.k, limit).workspace_doubles;
  if (fused_krylov(problem)) return 8 * plan_krylov_fused(problem.n, problem.k, limit).total_doubles;
  return 8 * (use_direct(problem.n, problem.k)
                  ? problem.batch * plan_direct(problem.n, problem.k, limit).workspace_doubles
                  : plan_krylov(problem.n, problem.k, limit).total_doubles);
}

void launch_topk_eigh(const Eigh& problem, const Context& context) {
  check_version("topk_eigh", problem.version, kVersions);
  if (problem.batch == 0 || problem.n == 0 || problem.k == 0) return;
  if (problem.dtype == DType::kFloat32)
    launch<float>(problem, context);
  else
    launch<double>(problem, context);
}

}  // namespace catapult::cuda
