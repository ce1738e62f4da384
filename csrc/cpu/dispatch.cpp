#include "cpu/kernel_table.h"

namespace catapult {

namespace cpu {

const KernelTable& kernels() {
#if defined(CATAPULT_HAVE_X86)
  switch (simd_level()) {
    case SimdLevel::kAvx512: return avx512_kernels();
    case SimdLevel::kAvx2: return avx2_kernels();
    default: break;
  }
#endif
  return scalar_kernels();
}

}  // namespace cpu

bool ntk_gram(const NtkGram& problem) { return cpu::kernels().ntk_gram(problem); }
bool ntk_gram_cross(const NtkGramCross& problem) { return cpu::kernels().ntk_gram_cross(problem); }
bool jacobian_accumulate(const JacobianAccumulate& problem) {
  return cpu::kernels().jacobian_accumulate(problem);
}
bool agop_reduce(const AgopReduce& problem) { return cpu::kernels().agop_reduce(problem); }
double agop_inner(const AgopInner& problem) { return cpu::kernels().agop_inner(problem); }
void topk_eigh(const TopkEigh& problem) { cpu::kernels().topk_eigh(problem); }
void spectral_norm(const SpectralNorm& problem) { cpu::kernels().spectral_norm(problem); }
void rank_updates(const RankUpdate* updates, int64_t count, int threads) {
  cpu::kernels().rank_updates(updates, count, threads);
}
double residual(const Residual& problem) { return cpu::kernels().residual(problem); }
int64_t chain_sgd(const ChainSgd& problem) { return cpu::kernels().chain_sgd(problem); }

}  // namespace catapult
