// total = X Y^T for a (16 RX) x (16 RY) tile: the inside of every product on the device.
// A loader gives rows of X or Y: `row(r)` once per thread and row, `at(row, k)` once per element, and
// `rows_fastest()`: whether neighbours in memory are rows (or columns), so that loads coalesce.
// Sums run in T over kPromote columns and join a double there: the float32 error does not grow with
// the depth.
#pragma once

#include "cuda/device.cuh"

namespace catapult::cuda {

// Rows of a matrix with any strides, 0 included. Row r is sample r / c, output r % c.
template <typename T>
struct MatrixRows {
  const T* data;
  int64_t sample_stride, output_stride, column_stride;
  int64_t c;      // outputs per sample
  int64_t first;  // row of the matrix that is row 0 of the tile
  int64_t rows;   // of the matrix: beyond them is zero

  using Row = const T*;
  __device__ bool rows_fastest() const { return column_stride != 1 && c == 1 && sample_stride == 1; }
  __device__ Row row(int r) const {
    int64_t index = first + r;
    if (index >= rows) return nullptr;
    return data + (index / c) * sample_stride + (index % c) * output_stride;
  }
  __device__ T at(Row row, int64_t k) const { return row == nullptr ? T(0) : row[k * column_stride]; }
};

// Which element of a tile a thread loads: `step` counts the elements of one thread.
struct LoadMap {
  bool rows_fastest;
  int rows;  // of the tile
  __device__ int row(int step) const {
    int element = threadIdx.x + step * kThreads;
    return rows_fastest ? element % rows : element / kDepth;
  }
  __device__ int column(int step) const {
    int element = threadIdx.x + step * kThreads;
    return rows_fastest ? element / rows : element % kDepth;
  }
};

template <typename T, int RX, int RY>
CATAPULT_HOST_DEVICE constexpr int64_t tile_shared_bytes() {
  return static_cast<int64_t>(sizeof(T)) * kDepth * (16 * RX + 4 + 16 * RY + 4);
}

// All kThreads threads of the block must call it. Thread (tx, ty) = (t % 16, t / 16) holds the
// elements (ty + 16 i, tx + 16 j). Uses tile_shared_bytes<T, RX, RY>() of shared memory.
template <typename T, int RX, int RY, typename X, typename Y>
__device__ inline void tile_product(const X& x, const Y& y, int64_t k_begin, int64_t k_end,
                                    double (&total)[RX][RY]) {
  constexpr int kRowsX = 16 * RX, kRowsY = 16 * RY;
  constexpr int kLineX = kRowsX + 4, kLineY = kRowsY + 4;  // [kDepth, line], padded against bank conflicts
  T* shared_x = static_cast<T*>(shared_memory());
  T* shared_y = shared_x + kDepth * kLineX;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const LoadMap map_x{x.rows_fastest(), kRowsX}, map_y{y.rows_fastest(), kRowsY};

  typename X::Row rows_x[RX];
  typename Y::Row rows_y[RY];
#pragma unroll
  for (int i = 0; i < RX; ++i) rows_x[i] = x.row(map_x.row(i));
#pragma unroll
  for (int j = 0; j < RY; ++j) rows_y[j] = y.row(map_y.row(j));

  T chain[RX][RY];
#pragma unroll
  for (int i = 0; i < RX; ++i)
#pragma unroll
    for (int j = 0; j < RY; ++j) {
      chain[i][j] = T(0);
      total[i][j] = 0.0;
    }

  for (int64_t k0 = k_begin; k0 < k_end; k0 += kDepth) {
    __syncthreads();  // everyone is done with the last columns
#pragma unroll
    for (int i = 0; i < RX; ++i) {
      const int k = map_x.column(i);
      shared_x[k * kLineX + map_x.row(i)] = k0 + k < k_end ? x.at(rows_x[i], k0 + k) : T(0);
    }
#pragma unroll
    for (int j = 0; j < RY; ++j) {
      const int k = map_y.column(j);
      shared_y[k * kLineY + map_y.row(j)] = k0 + k < k_end ? y.at(rows_y[j], k0 + k) : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      T a[RX], b[RY];
#pragma unroll
      for (int i = 0; i < RX; ++i) a[i] = shared_x[k * kLineX + ty + 16 * i];
#pragma unroll
      for (int j = 0; j < RY; ++j) b[j] = shared_y[k * kLineY + tx + 16 * j];
#pragma unroll
      for (int i = 0; i < RX; ++i)
#pragma unroll
        for (int j = 0; j < RY; ++j) chain[i][j] += a[i] * b[j];
    }
    if ((k0 - k_begin + kDepth) % kPromote == 0 || k0 + kDepth >= k_end) {
#pragma unroll
      for (int i = 0; i < RX; ++i)
#pragma unroll
        for (int j = 0; j < RY; ++j) {
          total[i][j] += static_cast<double>(chain[i][j]);
          chain[i][j] = T(0);
        }
    }
  }
}

}  // namespace catapult::cuda
