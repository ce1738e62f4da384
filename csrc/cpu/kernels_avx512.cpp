#define CATAPULT_ISA avx512
#include "cpu/kernels.inc"

namespace catapult::cpu {
const KernelTable& avx512_kernels() { return avx512::kTable; }
}  // namespace catapult::cpu
