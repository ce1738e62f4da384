// Asynchronous copies from global to shared memory (cp.async). They are issued in groups, which
// complete in order; what a thread has waited for, others see behind the next barrier.
#pragma once

#include <cuda_runtime.h>

namespace catapult::cuda {

// Copies kBytes = 4, 8 or 16, both addresses aligned to that; only the first source_bytes of the source
// are read, the rest of the target becomes zero (0 reads nothing, but the address must be aligned).
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, int source_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "sizes of cp.async");
#if defined(CATAPULT_CUDA_EMULATOR)
  emulator::copy_async(shared, global, kBytes, static_cast<unsigned>(source_bytes));
#else
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  // 16 bytes go past the first-level cache: tiles are read once by a block.
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(target), "l"(global), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(target), "l"(global), "n"(kBytes), "r"(source_bytes)
                 : "memory");
#endif
}

// Closes the group of the copies that this thread has issued since the last one.
__device__ inline void commit_copies() {
#if defined(CATAPULT_CUDA_EMULATOR)
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kGroupsLeft latest groups of this thread are under way.
template <int kGroupsLeft>
__device__ inline void wait_copies() {
#if defined(CATAPULT_CUDA_EMULATOR)
  emulator::wait_copies(kGroupsLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

}  // namespace catapult::cuda
