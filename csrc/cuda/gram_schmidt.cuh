// Orthonormal vectors in order, by one block: two passes of classical Gram-Schmidt, which is as good
// as Householder in double; dependent vectors are replaced, never divided by their rounding noise.
#pragma once

#include "cuda/device.cuh"

namespace catapult::cuda {

// Makes vectors [first, last) (each of length n, contiguous) orthonormal to each other and to the
// orthonormal vectors [0, first). `products` holds `last` doubles, `slots` kReduceSlots of shared memory.
__device__ inline void gram_schmidt(double* vectors, int64_t n, int64_t first, int64_t last, double* products,
                                    double* slots) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t j = first; j < last; ++j) {
    double* x = vectors + j * n;
    double largest = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) largest = fmax(largest, fabs(x[i]));
    largest = block_max(largest, slots);  // first, so that squares neither overflow nor vanish
    const bool usable = largest > 0.0 && largest < 1e300;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
      x[i] = usable ? x[i] / largest : counter_random(static_cast<uint64_t>(j) + 1000000, i);
    __syncthreads();
    for (int pass = 0; pass < 3; ++pass) {  // normalise, then twice: project, normalise
      if (pass > 0) {
        for (int64_t p = warp; p < j; p += warps) {
          const double* other = vectors + p * n;
          double dot = 0.0;
          for (int64_t i = lane; i < n; i += 32) dot += other[i] * x[i];
          dot = warp_sum(dot);
          if (lane == 0) products[p] = dot;
        }
        __syncthreads();
      }
      double squares = 0.0;
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        double value = x[i];
        if (pass > 0)
          for (int64_t p = 0; p < j; ++p) value -= products[p] * vectors[p * n + i];
        x[i] = value;
        squares += value * value;
      }
      squares = block_sum(squares, slots);
      // Nothing left: x lay in the span of the others. Continue with another vector.
      const bool vanished = !(squares > 1e-28);
      const double inverse = vanished ? 0.0 : 1.0 / sqrt(squares);
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        x[i] = vanished ? counter_random(static_cast<uint64_t>(j) + 2000000 + pass, i) : x[i] * inverse;
      __syncthreads();
    }
  }
}

}  // namespace catapult::cuda
