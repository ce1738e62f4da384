#define CATAPULT_ISA avx2
#include "cpu/kernels.inc"

namespace catapult::cpu {
const KernelTable& avx2_kernels() { return avx2::kTable; }
}  // namespace catapult::cpu
