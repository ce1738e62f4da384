// One table of kernels per instruction set. Every level compiles the same sources (kernels.inc) in
// its own namespace, with its own flags, in its own object file; dispatch.cpp picks a table once.
#pragma once

#include "core/agop_reduce.h"
#include "core/chain_sgd.h"
#include "core/cpu_features.h"
#include "core/jacobian_accumulate.h"
#include "core/ntk_gram.h"
#include "core/rank_update.h"
#include "core/residual.h"
#include "core/topk_eigh.h"

namespace catapult::cpu {

struct KernelTable {
  bool (*ntk_gram)(const NtkGram&);
  bool (*ntk_gram_cross)(const NtkGramCross&);
  bool (*jacobian_accumulate)(const JacobianAccumulate&);
  bool (*agop_reduce)(const AgopReduce&);
  double (*agop_inner)(const AgopInner&);
  void (*topk_eigh)(const TopkEigh&);
  void (*spectral_norm)(const SpectralNorm&);
  void (*rank_updates)(const RankUpdate*, int64_t, int);
  double (*residual)(const Residual&);
  int64_t (*chain_sgd)(const ChainSgd&);
};

const KernelTable& scalar_kernels();
#if defined(CATAPULT_HAVE_X86)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

// The table of the level in use (core/cpu_features.h).
const KernelTable& kernels();

}  // namespace catapult::cpu
