#define CATAPULT_ISA scalar
#include "cpu/kernels.inc"

namespace catapult::cpu {
const KernelTable& scalar_kernels() { return scalar::kTable; }
}  // namespace catapult::cpu
