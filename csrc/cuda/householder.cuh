// Eigenvalues of one symmetric matrix of at most kFusedLimit rows by one block, in double: Householder
// reduction to tridiagonal form and multisection. A step of the reduction reads the matrix once: the update
// of the step before and the product with the new reflector share a pass, and up to kPanelSide rows the
// matrix stays in registers. Between two passes one warp makes the next reflector from the one column that it
// needs, so that a step has two barriers.
#pragma once

#include "cuda/device.cuh"
#include "cuda/fused_plan.h"
#include "cuda/tridiagonal.h"

namespace catapult::cuda {

// Sum over a warp in three rounds of exchanges instead of five; bitwise the same in every lane.
__device__ inline double warp_sum_wide(double value) {
#pragma unroll
  for (int step = 8; step > 1; step /= 4) {
    const double a = __shfl_xor_sync(kFullWarp, value, step);
    const double b = __shfl_xor_sync(kFullWarp, value, 2 * step);
    const double c = __shfl_xor_sync(kFullWarp, value, 3 * step);
    value = (value + a) + (b + c);
  }
  return value + __shfl_xor_sync(kFullWarp, value, 1);
}

// Four sums over a warp at once, in every lane: nine exchanges instead of twenty.
__device__ inline void warp_sums(double (&v)[4]) {
  const int lane = threadIdx.x % 32;
  const bool high = (lane & 16) != 0, odd = (lane & 8) != 0;
  const double a = (high ? v[2] : v[0]) + __shfl_xor_sync(kFullWarp, high ? v[0] : v[2], 16);
  const double b = (high ? v[3] : v[1]) + __shfl_xor_sync(kFullWarp, high ? v[1] : v[3], 16);
  double own = (odd ? b : a) + __shfl_xor_sync(kFullWarp, odd ? a : b, 8);  // of v[2 high + odd]
#pragma unroll
  for (int step = 4; step > 0; step /= 2) own += __shfl_xor_sync(kFullWarp, own, step);
  const double by_8 = __shfl_xor_sync(kFullWarp, own, 8), by_16 = __shfl_xor_sync(kFullWarp, own, 16);
  const double by_24 = __shfl_xor_sync(kFullWarp, own, 24);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int distance = (2 * high + odd) ^ i;
    v[i] = distance == 0 ? own : distance == 1 ? by_8 : distance == 2 ? by_16 : by_24;
  }
}

// Memory of the reduction. Arrays without a length are [kPanels kPanelSide], zero beyond n.
template <int kPanels>
struct Householder {
  static constexpr int kSide = kPanels * kPanelSide;

  int n, ld;               // ld is odd: neither rows nor columns meet in one bank
  double* matrix;          // [n, ld] full square; row s ends up holding reflector s behind column s
  double* slots;           // [kReduceSlots]
  double *d, *e, *tau;     // H_s = 1 - tau_s u_s u_s^T, u_s zero up to s; 1 / tau_s until the next step
  double* reflectors;      // [2, kSide]: of step s at s % 2
  double *w, *p, *column;  // of the update A -= u w^T + w u^T; A u; the column of the next step
  double* corner;          // [1] the last diagonal element, before the last update

  // Takes kHouseholderArrays kSide + kReduceSlots + 1 doubles of shared memory from `next` on.
  __device__ void take_shared(double*& next) {
    auto take = [&next](int doubles) {
      double* pointer = next;
      next += doubles;
      return pointer;
    };
    d = take(kSide);
    e = take(kSide);
    tau = take(kSide);
    reflectors = take(2 * kSide);
    w = take(kSide);
    p = take(kSide);
    column = take(kSide);
    slots = take(kReduceSlots);
    corner = take(1);
  }
};

// matrix <- kernel / norm, of which the lower triangle is read. With norm = 0: as it is. Returns the largest
// |entry| of the kernel, or NaN when one is not finite.
template <int kPanels, typename T>
__device__ double load_square(const Householder<kPanels>& work, const T* kernel, int64_t stride,
                              double norm) {
  const int n = work.n, ld = work.ld;
  const double factor = norm == 0.0 ? 1.0 : norm;
  double largest = 0.0;
  int bad = 0;
  for (int i = threadIdx.x / 32; i < n; i += kFusedThreads / 32)
    for (int j = threadIdx.x % 32; j <= i; j += 32) {
      const double value = static_cast<double>(kernel[i * stride + j]);
      bad |= !isfinite(value);
      largest = fmax(largest, fabs(value));
      work.matrix[i * ld + j] = work.matrix[j * ld + i] = value / factor;
    }
  largest = block_max(largest, work.slots);
  return __syncthreads_or(bad) ? nan("") : largest;
}

template <int kPanels>
__device__ void scale_square(const Householder<kPanels>& work, double norm) {
  for (int i = threadIdx.x; i < work.n * work.ld; i += kFusedThreads)
    if (i % work.ld < work.n) work.matrix[i] /= norm;
  __syncthreads();
}

// One warp: finishes step h - 1 (w from p), which gives row h of the matrix as it is behind that step, and
// from it reflector h.
template <int kPanels>
__device__ void next_reflector(const Householder<kPanels>& work, int h) {
  constexpr int kRows = kPanels * kPanelSide / 32, kSide = Householder<kPanels>::kSide;
  const int lane = threadIdx.x;
  const double* old = work.reflectors + (h + 1) % 2 * kSide;
  double* fresh = work.reflectors + h % 2 * kSide;
  // Only now, beside the sums, since the pass before did not wait for the division.
  const double size = h > 0 ? work.tau[h - 1] : 0.0;
  const double tau = size > 0.0 ? 1.0 / size : 0.0;
  double u[kRows], w[kRows];
  double dot = 0.0;  // u^T A u
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    const int i = lane + 32 * q;
    u[q] = old[i];
    w[q] = i >= h ? work.p[i] : 0.0;
    dot += u[q] * w[q];
  }
  const double half = 0.5 * tau * warp_sum_wide(dot);
  auto w_at = [&](int i) { return tau * (work.p[i] - half * old[i]); };
  const double u_h = old[h], w_h = w_at(h);
  const double head = work.column[h + 1] - old[h + 1] * w_h - w_at(h + 1) * u_h;
  double squares = 0.0;
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    const int i = lane + 32 * q;
    w[q] = tau * (w[q] - half * u[q]);
    work.w[i] = w[q];
    u[q] = work.column[i] - u[q] * w_h - w[q] * u_h;  // from here on the row itself
    if (i == h) work.d[h] = u[q];
    if (i > h + 1 && i < work.n) squares += u[q] * u[q];
  }
  squares = warp_sum_wide(squares);
  double beta = head, next_size = 0.0;
  if (squares > 1e-200) {  // of a matrix with largest entry 1: what is left out is far below rounding
    const double length = sqrt(head * head + squares);
    beta = -copysign(length, head);
    next_size = length * (length + fabs(head));
  }
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    const int i = lane + 32 * q;
    const double value = i == h + 1 ? head - beta : i > h + 1 && i < work.n ? u[q] : 0.0;
    fresh[i] = next_size == 0.0 ? 0.0 : value;
  }
  if (lane == 0) {
    work.e[h] = beta;
    work.tau[h] = next_size;
    if (h > 0) work.tau[h - 1] = tau;
  }
}

// A thread's share of a panel of kPanelSide x kPanelSide: rows ty + 16 r, columns tx + 16 c.
using Tile = double[8][8];

template <int kPanels>
__device__ __forceinline__ void load_tile(const Householder<kPanels>& work, int first_row, int first_column,
                                          int above, Tile& tile) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int c = 0; c < 8; ++c)
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const int i = first_row + ty + 16 * r, j = first_column + tx + 16 * c;
      tile[r][c] = i > above && j > above && i < work.n && j < work.n ? work.matrix[i * work.ld + j] : 0.0;
    }
}

// A -= u w^T + w u^T of the step before, p = A u of this one, and the column of the next one.
template <int kPanels>
__device__ __forceinline__ void fused_pass(const Householder<kPanels>& work, int step, Tile& tile) {
  constexpr int kSide = Householder<kPanels>::kSide;
  const int n = work.n, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const double* old = work.reflectors + (step + 1) % 2 * kSide;
  const double* fresh = work.reflectors + step % 2 * kSide;
  const bool last = step == n - 3;
  for (int i = threadIdx.x; i < n; i += kFusedThreads)
    if (i > step) work.matrix[step * work.ld + i] = fresh[i];
#pragma unroll 1
  for (int panel_row = 0; panel_row < kPanels; ++panel_row) {
    const int first_row = panel_row * kPanelSide;
    if (first_row + kPanelSide <= step + 1 || first_row >= n) continue;
    double u[8], w[8], sum[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      u[r] = old[first_row + ty + 16 * r];
      w[r] = work.w[first_row + ty + 16 * r];
      sum[r] = 0.0;
    }
#pragma unroll 1
    for (int panel_column = 0; panel_column < kPanels; ++panel_column) {
      const int first_column = panel_column * kPanelSide;
      if (first_column + kPanelSide <= step + 1 || first_column >= n) continue;
      if (kPanels > 1) load_tile(work, first_row, first_column, step, tile);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int columns = first_column + 16 * c, j = columns + tx;
        if (columns + 16 <= step + 1 || columns >= n) continue;  // the same for all threads
        const double u_j = old[j], w_j = work.w[j], fresh_j = fresh[j];
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int rows = first_row + 16 * r;
          if (rows + 16 <= step + 1 || rows >= n) continue;
          tile[r][c] -= u[r] * w_j + w[r] * u_j;
          sum[r] += tile[r][c] * fresh_j;
        }
        if (j == step + 1) {
#pragma unroll
          for (int r = 0; r < 8; ++r) work.column[first_row + ty + 16 * r] = tile[r][c];
        }
        if (last && j == n - 1) {
#pragma unroll
          for (int r = 0; r < 8; ++r)
            if (first_row + ty + 16 * r == n - 1) *work.corner = tile[r][c];
        }
        if (kPanels > 1) {
#pragma unroll
          for (int r = 0; r < 8; ++r) {
            const int i = first_row + ty + 16 * r;
            if (i > step && j > step && i < n && j < n) work.matrix[i * work.ld + j] = tile[r][c];
          }
        }
      }
    }
    // Sums over the 16 threads of a row: every exchange halves the rows that a thread holds.
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = (tx & (2 * half)) != 0;
#pragma unroll
      for (int r = 0; r < half; ++r) {
        const double keep = upper ? sum[r + half] : sum[r], send = upper ? sum[r] : sum[r + half];
        sum[r] = keep + __shfl_xor_sync(kFullWarp, send, 2 * half);
      }
    }
    sum[0] += __shfl_xor_sync(kFullWarp, sum[0], 1);
    if (tx % 2 == 0) work.p[first_row + ty + 16 * (tx / 2)] = sum[0];
  }
}

// H_{n-3} .. H_0 A H_0 .. H_{n-3} = T. Returns its spectral bound; d and e then hold T / bound and w the
// squares of its couplings.
template <int kPanels>
__device__ double tridiagonalise_fused(const Householder<kPanels>& work) {
  constexpr int kSide = Householder<kPanels>::kSide;
  const int n = work.n;
  for (int i = threadIdx.x; i < kSide; i += kFusedThreads) {
    work.d[i] = work.e[i] = work.tau[i] = work.w[i] = work.p[i] = 0.0;
    work.reflectors[i] = work.reflectors[kSide + i] = 0.0;
    work.column[i] = i < n ? work.matrix[i * work.ld] : 0.0;
  }
  if (threadIdx.x == 0) *work.corner = work.matrix[(n - 1) * work.ld + n - 1];
  Tile tile;
  if (kPanels == 1) load_tile(work, 0, 0, -1, tile);
  __syncthreads();
  for (int h = 0; h + 1 < n; ++h) {
    if (threadIdx.x < 32) next_reflector(work, h);
    __syncthreads();
    if (h + 2 < n) {
      fused_pass(work, h, tile);
      __syncthreads();
    }
  }
  if (threadIdx.x == 0)  // the update of the last step is still open
    work.d[n - 1] = *work.corner - 2.0 * work.reflectors[(n + 1) % 2 * kSide + n - 1] * work.w[n - 1];
  __syncthreads();
  double bound = 0.0;  // Gershgorin
  for (int i = threadIdx.x; i < n; i += kFusedThreads)
    bound = fmax(bound, fabs(work.d[i]) + fabs(work.e[i]) + (i > 0 ? fabs(work.e[i - 1]) : 0.0));
  bound = block_max(bound, work.slots);
  const double factor = bound > 0.0 ? bound : 1.0;
  for (int i = threadIdx.x; i < n; i += kFusedThreads) {
    work.d[i] /= factor;
    work.e[i] /= factor;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kFusedThreads)
    work.w[i] = i == 0 ? 0.0 : squared_coupling(work.e[i - 1]);
  __syncthreads();
  return factor;
}

// The k largest eigenvalues of T, descending: half a warp narrows the interval of one of them, a lane a
// shift.
template <int kPanels>
__device__ void multisection_fused(const Householder<kPanels>& work, int k, double* values) {
  constexpr int kShifts = 16;
  const int index = threadIdx.x % kShifts, half = threadIdx.x % 32 / kShifts;
  for (int first = threadIdx.x / 32 * 2; first < k; first += kFusedThreads / kShifts) {
    const int rank = min(first + half, k - 1);
    double low = -1.0 - 4.0 * kDoubleEpsilon, high = -low;
    bool open = true;
    for (int round = 0; round < kSectionRounds && __ballot_sync(kFullWarp, open) != 0; ++round) {
      const double shift = section<kShifts>(low, high, index);
      const bool above = count_above_scaled(work.d, work.w, work.n, shift) > rank;
      const unsigned votes = __ballot_sync(kFullWarp, above) >> (kShifts * half) & 0xffffu;
      if (open) narrow_interval<kShifts>(votes, low, high);
      open = high - low > kDoubleEpsilon;
    }
    if (index == 0) values[rank] = 0.5 * (low + high);
  }
  __syncthreads();
}

}  // namespace catapult::cuda
