// The k largest eigenpairs of one symmetric matrix by one block, in double: reduction and multisection of
// householder.cuh, inverse iteration of all wanted vectors at once, each made orthogonal to all before it
// (clusters and exact ties come out orthonormal), back-transformation by groups of four reflectors. No step
// depends on gaps between eigenvalues, every loop has a fixed bound.
#pragma once

#include "cuda/householder.cuh"

namespace catapult::cuda {

// Results of a matrix, of which the Householder part is in shared memory, the rest where it fits.
struct Eigenpairs {
  int k;
  double* values;    // [k] descending, of T / bound
  double* products;  // [k]
  double* vectors;   // [k, ld]
  double* bands;     // [n, 5, k]

  // Takes FusedPlan::vectors_doubles from `next` on.
  __device__ void take(double*& next, int n, int ld, int pairs) {
    k = pairs;
    values = next;
    products = values + k;
    vectors = products + k;
    bands = vectors + k * ld;
    next = bands + 5 * n * k;
  }
};

// Makes vectors [k, ld] of length n <= kFusedThreads orthonormal in order: two passes of classical
// Gram-Schmidt, which is as good as Householder in double. Dependent vectors are replaced, never divided by
// their rounding noise. Four barriers a vector.
__device__ inline void orthonormalise(double* vectors, int ld, int n, int k, double* products) {
  const int lane = threadIdx.x % 32, i = threadIdx.x;
  for (int j = 0; j < k; ++j) {
    double* x = vectors + j * ld;
    for (int attempt = 0;; ++attempt) {
      double before = 0.0, left = 0.0, value = 0.0;
      for (int pass = 0; pass < 2; ++pass) {
        for (int p = threadIdx.x / 32; p <= j; p += kFusedThreads / 32) {
          double dot = 0.0;
          for (int m = lane; m < n; m += 32) dot += vectors[p * ld + m] * x[m];
          dot = warp_sum_wide(dot);
          if (lane == 0) products[p] = dot;
        }
        __syncthreads();
        if (pass == 0) before = products[j];
        left = products[j];  // the square of x; the second pass takes next to nothing from it
        if (pass == 1)
          for (int p = 0; p < j; ++p) left -= products[p] * products[p];
        if (i < n) {
          value = x[i];
          for (int p = 0; p < j; ++p) value -= products[p] * vectors[p * ld + i];
          if (pass == 0) x[i] = value;
        }
        if (pass == 0) __syncthreads();
      }
      // Nothing left: x lay in the span of the others. Continue with another vector.
      const bool vanished = !(left > 1e-24 * before) || !(before > 1e-280) || !isfinite(before);
      const bool again = vanished && attempt < 3;
      if (i < n)
        x[i] = again ? counter_random(static_cast<uint64_t>(j) + 1000000 * (attempt + 1), i)
                     : value / sqrt(left);
      __syncthreads();
      if (!again) break;
    }
  }
}

template <int kPanels>
__device__ void tridiagonal_vectors_fused(const Householder<kPanels>& work, const Eigenpairs& pairs) {
  const int n = work.n, ld = work.ld, k = pairs.k;
  for (int j = threadIdx.x / 32; j < k; j += kFusedThreads / 32)
    for (int i = threadIdx.x % 32; i < n; i += 32) pairs.vectors[j * ld + i] = counter_random(j, i);
  for (int j = threadIdx.x; j < k; j += kFusedThreads)
    shifted_factor(work.d, work.e, n, pairs.values[j], kDoubleEpsilon, pairs.bands + j, k);
  __syncthreads();
  for (int iteration = 0; iteration < kFusedIterations; ++iteration) {
    for (int j = threadIdx.x; j < k; j += kFusedThreads)
      factored_solve(n, pairs.bands + j, k, pairs.vectors + j * ld);
    __syncthreads();
    orthonormalise(pairs.vectors, ld, n, k, pairs.products);
  }
}

// vectors[j] <- H_0 .. H_{n-3} vectors[j], a warp per vector; largest |component| made positive. Four
// reflectors at a time: their products with the vector are one reduction, and what the later ones miss of the
// earlier follows from the products of the reflectors with each other.
template <int kPanels>
__device__ void back_transform_fused(const Householder<kPanels>& work, const Eigenpairs& pairs) {
  constexpr int kRows = kPanels * kPanelSide / 32, kGroup = 4;
  const int n = work.n, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kFusedThreads / 32;
  const int groups = n > 2 ? (n - 2 + kGroup - 1) / kGroup : 0;
  auto reflector = [&](int s, int i) {
    return s >= 0 && i > s && i < n ? work.matrix[s * work.ld + i] : 0.0;
  };
  double* among = work.w;  // [groups, 8]: (b, a) of reflectors a < b of a group at b (b - 1) / 2 + a
  for (int group = warp; group < groups; group += warps) {
    const int top = n - 3 - kGroup * group;
    double first[4] = {}, second[4] = {};
    for (int i = lane; i < n; i += 32) {
      double v[kGroup];
#pragma unroll
      for (int a = 0; a < kGroup; ++a) v[a] = reflector(top - a, i);
      first[0] += v[1] * v[0];
      first[1] += v[2] * v[0];
      first[2] += v[2] * v[1];
      first[3] += v[3] * v[0];
      second[0] += v[3] * v[1];
      second[1] += v[3] * v[2];
    }
    warp_sums(first);
    warp_sums(second);
    if (lane == 0) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        among[8 * group + q] = first[q];
        among[8 * group + 4 + q] = second[q];
      }
    }
  }
  __syncthreads();
  // Two vectors at a time, since waiting is most of it.
  for (int j = warp; j < pairs.k; j += 2 * warps) {
    const bool both = j + warps < pairs.k;
    double* const vector[2] = {pairs.vectors + j * work.ld, pairs.vectors + (both ? j + warps : j) * work.ld};
    double x[2][kRows];
#pragma unroll
    for (int q = 0; q < kRows; ++q)
#pragma unroll
      for (int m = 0; m < 2; ++m) x[m][q] = lane + 32 * q < n ? vector[m][lane + 32 * q] : 0.0;
    for (int group = 0; group < groups; ++group) {
      const int top = n - 3 - kGroup * group;
      double v[kGroup][kRows], dots[2][kGroup] = {};
#pragma unroll
      for (int a = 0; a < kGroup; ++a)
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          v[a][q] = reflector(top - a, lane + 32 * q);
#pragma unroll
          for (int m = 0; m < 2; ++m) dots[m][a] += v[a][q] * x[m][q];
        }
      const double* g = among + 8 * group;
      auto tau = [&](int a) { return top - a >= 0 ? work.tau[top - a] : 0.0; };
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        warp_sums(dots[m]);
        const double c0 = tau(0) * dots[m][0];
        const double c1 = tau(1) * (dots[m][1] - c0 * g[0]);
        const double c2 = tau(2) * (dots[m][2] - c0 * g[1] - c1 * g[2]);
        const double c3 = tau(3) * (dots[m][3] - c0 * g[3] - c1 * g[4] - c2 * g[5]);
#pragma unroll
        for (int q = 0; q < kRows; ++q) x[m][q] -= c0 * v[0][q] + c1 * v[1][q] + c2 * v[2][q] + c3 * v[3][q];
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m == 1 && !both) continue;
      double extreme = 0.0;
      int where = n;
#pragma unroll
      for (int q = 0; q < kRows; ++q)
        if (fabs(x[m][q]) > fabs(extreme)) {
          extreme = x[m][q];
          where = lane + 32 * q;
        }
      warp_extreme(extreme, where);
#pragma unroll
      for (int q = 0; q < kRows; ++q)
        if (lane + 32 * q < n) vector[m][lane + 32 * q] = extreme < 0.0 ? -x[m][q] : x[m][q];
    }
  }
  __syncthreads();
}

// Eigenpairs of work.matrix, full square with entries of at most 1, which is overwritten. Values are those of
// the matrix over the bound that is returned; vectors have a largest component that is positive.
template <int kPanels>
__device__ double solve_direct(const Householder<kPanels>& work, const Eigenpairs& pairs) {
  const double bound = tridiagonalise_fused(work);
  multisection_fused(work, pairs.k, pairs.values);
  if (threadIdx.x == 0)  // counts of neighbours may differ by rounding
    for (int j = 1; j < pairs.k; ++j) pairs.values[j] = fmin(pairs.values[j], pairs.values[j - 1]);
  __syncthreads();
  tridiagonal_vectors_fused(work, pairs);
  back_transform_fused(work, pairs);
  return bound;
}

}  // namespace catapult::cuda
