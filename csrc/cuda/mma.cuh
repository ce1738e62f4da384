// Tensor core products of a warp, D = A B + C with A [16, 8], B [8, 8], C and D [16, 8]. Lane 4 g + t holds
//   a[0] A[g, t]   a[1] A[g + 8, t]   a[2] A[g, t + 4]   a[3] A[g + 8, t + 4]
//   b[0] B[t, g]   b[1] B[t + 4, g]
//   c[0] C[g, 2 t] c[1] C[g, 2 t + 1] c[2] C[g + 8, 2 t] c[3] C[g + 8, 2 t + 1]
// and all lanes of the warp must call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace catapult::cuda {

// x = high + low, exactly, for finite x. The tensor cores read 11 significand bits: all of high, which is x
// rounded to them, and all but the last of the (at most 12) of low. Three products of parts (high low,
// low high, high high) reach float32. Cut off instead of rounded, low would be twice as large and never
// negative: an addition less, but errors of four times the size that do not cancel.
__device__ inline void split_tf32(float x, uint32_t& high, uint32_t& low) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}

// TF32 operands (bits of a float, the last 13 are ignored), float32 accumulators that are rounded TOWARD
// ZERO: long sums drift, so callers move them to a sum of their own every few products.
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const float (&c)[4]) {
#if defined(CATAPULT_CUDA_EMULATOR)
  emulator::mma_tf32(d, a, b, c);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#endif
}

// D += A B in float64.
__device__ inline void mma_f64(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if defined(CATAPULT_CUDA_EMULATOR)
  emulator::mma_f64(d, a, b);
#elif __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
  // The only float64 shape before Hopper is [8, 4] times [4, 8]: the fragments are quarters of ours.
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
          : "+d"(d[2 * half]), "+d"(d[2 * half + 1])
          : "d"(a[2 * k + half]), "d"(b[k]));
#endif
}

}  // namespace catapult::cuda
