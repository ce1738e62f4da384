// Small device helpers. Sums over a warp or a block follow a fixed tree: no float atomics anywhere.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/plans.h"

namespace catapult::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Bits of the status word of a device; set by kernels, read by the host when it reads a value.
enum Status : int { kNonFinite = 1, kNotConverged = 2, kNoSuchSample = 4 };

#if !defined(CATAPULT_CUDA_EMULATOR)
__device__ inline void* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#else
using emulator::shared_memory;
#endif

__device__ inline void raise_status(int* status, int bit) { atomicOr(status, bit); }

// Of all lanes' values the one of largest magnitude with its place, the first place of equals.
__device__ inline void warp_extreme(double& extreme, int& where) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, extreme, offset);
    const int other_where = __shfl_xor_sync(kFullWarp, where, offset);
    if (fabs(other) > fabs(extreme) || (fabs(other) == fabs(extreme) && other_where < where)) {
      extreme = other;
      where = other_where;
    }
  }
}

__device__ inline double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// Sum (or maximum) over the block, the same in every thread. `slots` has kReduceSlots doubles of
// shared memory. All threads of the block must call it.
template <bool kMaximum = false>
__device__ inline double block_reduce(double value, double* slots) {
  auto combine = [](double a, double b) { return kMaximum ? (a > b ? a : b) : a + b; };
  for (int offset = 16; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
  __syncthreads();  // the slots may still be read from the last call
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = slots[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) total = combine(total, slots[warp]);
    slots[32] = total;
  }
  __syncthreads();
  return slots[32];
}

__device__ inline double block_sum(double value, double* slots) { return block_reduce<false>(value, slots); }
__device__ inline double block_max(double value, double* slots) { return block_reduce<true>(value, slots); }

// Element (i, j) of a symmetric matrix of which only the lower triangle is read.
template <typename T>
__device__ inline double load_symmetric(const T* matrix, int64_t stride, int64_t i, int64_t j) {
  return static_cast<double>(i >= j ? matrix[i * stride + j] : matrix[j * stride + i]);
}

// A counter-based random number in (-1, 1): start vectors are the same on every device and run.
CATAPULT_HOST_DEVICE inline double counter_random(uint64_t stream, uint64_t index) {
  uint64_t z = (stream + 1) * 0x9e3779b97f4a7c15ull + index * 0xd1342543de82ef95ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return (static_cast<double>(z >> 11) + 0.5) * (2.0 / 9007199254740992.0) - 1.0;
}

}  // namespace catapult::cuda
