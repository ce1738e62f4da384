// Clusters of blocks (Hopper and later): blocks that run at the same time and read each other's shared
// memory. Launched by Stream::launch_clusters, which refuses older devices; there the code below traps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace catapult::cuda {

// Rank of this block in its cluster.
__device__ inline unsigned cluster_rank() {
#if defined(CATAPULT_CUDA_EMULATOR)
  return emulator::cluster_rank();
#elif __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
  return 0;
#endif
}

// All threads of all blocks of the cluster; what was written to shared memory before is seen behind it.
// One more is needed before a block ends that others may still read.
__device__ inline void cluster_barrier() {
#if defined(CATAPULT_CUDA_EMULATOR)
  emulator::cluster_barrier();
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __trap();
#endif
}

// What lies at the address of `own`, in shared memory, but in block `rank` of the cluster.
template <typename T>
__device__ inline T load_from_block(const T* own, unsigned rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one register or two");
  T value{};
#if defined(CATAPULT_CUDA_EMULATOR)
  value = *static_cast<const T*>(emulator::cluster_address(own, rank));
#elif __CUDA_ARCH__ >= 900
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(remote) : "memory");
    memcpy(&value, &bits, sizeof(value));
  } else {
    uint64_t bits;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(remote) : "memory");
    memcpy(&value, &bits, sizeof(value));
  }
#else
  __trap();
#endif
  return value;
}

}  // namespace catapult::cuda
