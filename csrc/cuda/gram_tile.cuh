// Products X Y^T of a square tile whose columns stream through shared memory in several stages, so that
// copies run ahead of the arithmetic. The arithmetic is an engine: Ffma on the ordinary units, Tf32x3 and
// Float64 on the tensor cores. An engine is a thread's share of the tile:
//   kSide, kThreads, kElements   of the tile, of the block, elements of one thread
//   kDepth, kLine, kStages       columns in a stage, distance of its rows, number of stages
//   kBlocks                      blocks on a multiprocessor that the registers must allow
//   step(x, y)                   adds the columns of a stage, x and y [kSide, kLine] in shared memory
//   finish()                     completes the sums
//   total(e), row(e), column(e)  element e and where in the tile it lies
// Lines of stages are padded so that neither the copies nor the reads of a warp meet in a memory bank.
#pragma once

#include "cuda/cp_async.cuh"
#include "cuda/mma.cuh"
#include "cuda/tile_product.cuh"

namespace catapult::cuda {

// 16 bytes of shared memory at once.
__device__ inline void load_vector(const float* from, float (&to)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ inline void load_vector(const double* from, double (&to)[2]) {
  const double2 v = *reinterpret_cast<const double2*>(from);
  to[0] = v.x, to[1] = v.y;
}

// 8 x 8 elements a thread. Chains of kChain columns in T join a second sum: a float32 chain over all columns
// would lose more digits the longer it gets.
template <typename T, int kSideOfTile>
struct Ffma {
  using Scalar = T;
  static constexpr int kSide = kSideOfTile, kAcross = kSide / 8, kThreads = kAcross * kAcross;
  static constexpr int kElements = 64, kVector = 16 / sizeof(T);
  static constexpr int kDepth = 4 * kVector, kLine = kDepth + kVector, kStages = 3;
  static constexpr int kBlocks = kSide > kTile ? 1 : sizeof(T) == 4 ? 4 : 3;
  static constexpr int kChain = 4;  // stages
  static constexpr bool kPromotes = sizeof(T) == 4;

  T chain[8][8], sum[kPromotes ? 8 : 1][kPromotes ? 8 : 1];
  int steps = 0;
  int first_row, first_column;  // of elements that are kAcross apart

  __device__ Ffma() {
    // A warp is 4 x 8 threads: its reads of shared memory are 4 rows of X and 8 rows of Y.
    constexpr int kWarps = kAcross / 8;  // side by side
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    first_row = warp / kWarps * 4 + lane / 8;
    first_column = warp % kWarps * 8 + lane % 8;
  }

  __device__ void clear() {
    steps = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        chain[i][j] = T(0);
        if constexpr (kPromotes) sum[i][j] = T(0);
      }
  }

  __device__ void step(const T* x, const T* y) {
    x += first_row * kLine;
    y += first_column * kLine;
#pragma unroll 2  // of four: more would need more registers than there are
    for (int k = 0; k < kDepth; k += kVector) {
      T a[8][kVector];
#pragma unroll
      for (int i = 0; i < 8; ++i) load_vector(x + i * kAcross * kLine + k, a[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        T b[kVector];
        load_vector(y + j * kAcross * kLine + k, b);
#pragma unroll
        for (int v = 0; v < kVector; ++v)
#pragma unroll
          for (int i = 0; i < 8; ++i) chain[i][j] += a[i][v] * b[v];
      }
    }
    if (++steps % kChain == 0) promote();
  }

  __device__ void promote() {
    if constexpr (kPromotes) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sum[i][j] += chain[i][j];
          chain[i][j] = T(0);
        }
    }
  }

  __device__ void finish() { promote(); }

  __device__ T& total(int e) {
    if constexpr (kPromotes)
      return sum[e / 8][e % 8];
    else
      return chain[e / 8][e % 8];
  }
  __device__ int row(int e) const { return first_row + e / 8 * kAcross; }
  __device__ int column(int e) const { return first_column + e % 8 * kAcross; }
};

// Warps two by kSide / 32, each kSide / 2 rows by 32 columns in fragments of 16 x 8 (mma.cuh).
template <typename T, int kSideOfTile>
struct Fragments {
  using Scalar = T;
  static constexpr int kSide = kSideOfTile, kThreads = 2 * kSide;
  static constexpr int kDown = kSide / 32, kAcross = 4;  // fragments of a warp
  static constexpr int kElements = kDown * kAcross * 4;
  static constexpr int kDepth = 16, kLine = kDepth + 4;

  T sum[kDown][kAcross][4];
  int warp_row, warp_column, group, place;

  __device__ Fragments() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    warp_row = warp / (kSide / 32) * (kSide / 2);
    warp_column = warp % (kSide / 32) * 32;
    group = lane / 4;
    place = lane % 4;
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[i][j][q] = T(0);
  }

  // Element q of the fragment of X [16, 8] or Y^T [8, 8] that starts at this row and column of a stage.
  __device__ T x_element(const T* x, int i, int k, int q) const {
    return x[(warp_row + 16 * i + group + q % 2 * 8) * kLine + k + place + q / 2 * 4];
  }
  __device__ T y_element(const T* y, int j, int k, int q) const {
    return y[(warp_column + 8 * j + group) * kLine + k + place + q * 4];
  }

  __device__ void finish() {}

  __device__ T& total(int e) { return sum[e / (4 * kAcross)][e / 4 % kAcross][e % 4]; }
  __device__ int row(int e) const { return warp_row + e / (4 * kAcross) * 16 + group + e % 4 / 2 * 8; }
  __device__ int column(int e) const { return warp_column + e / 4 % kAcross * 8 + 2 * place + e % 2; }
};

// Float32 as three TF32 products. The tensor cores round their accumulators toward zero, so the sums of a
// stage (16 columns) join an accumulator that is rounded to nearest.
template <int kSideOfTile>
struct Tf32x3 : Fragments<float, kSideOfTile> {
  using Base = Fragments<float, kSideOfTile>;
  using Base::kAcross, Base::kDepth, Base::kDown, Base::sum;
  static constexpr int kStages = kSideOfTile > kTile ? 4 : 3;
  static constexpr int kBlocks = kSideOfTile > kTile ? 1 : 4;

  __device__ void step(const float* x, const float* y) {
    float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float part[kDown][kAcross][4];
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      uint32_t y_high[kAcross][2], y_low[kAcross][2];
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) split_tf32(this->y_element(y, j, k, q), y_high[j][q], y_low[j][q]);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        uint32_t x_high[4], x_low[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) split_tf32(this->x_element(x, i, k, q), x_high[q], x_low[q]);
        // Small products first; neighbours in this order do not wait for each other.
#pragma unroll
        for (int j = 0; j < kAcross; ++j) mma_tf32(part[i][j], x_low, y_high[j], k == 0 ? zero : part[i][j]);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) mma_tf32(part[i][j], x_high, y_low[j], part[i][j]);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) mma_tf32(part[i][j], x_high, y_high[j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[i][j][q] += part[i][j][q];
  }
};

struct Float64 : Fragments<double, kTile> {
  static constexpr int kStages = 3, kBlocks = 2;

  __device__ void step(const double* x, const double* y) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      double b[kAcross][2];
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) b[j][q] = y_element(y, j, k, q);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        double a[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) a[q] = x_element(x, i, k, q);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) mma_f64(sum[i][j], a, b[j]);
      }
    }
  }
};

// Shared memory of a block: where the rows of both factors begin, the stages, one element of every thread's
// share after the other.
template <typename Engine>
struct TileMemory {
  using T = typename Engine::Scalar;
  static constexpr int kStage = Engine::kSide * Engine::kLine;
  int64_t* offsets = static_cast<int64_t*>(shared_memory());  // [2, kSide]
  T* x = reinterpret_cast<T*>(offsets + 2 * Engine::kSide);   // [kStages, kSide, kLine]
  T* y = x + Engine::kStages * kStage;                        // [kStages, kSide, kLine]
  T* park = y + Engine::kStages * kStage;                     // [kElements, kThreads]

  static constexpr int64_t bytes(bool with_park) {
    const int64_t elements =
        2 * Engine::kStages * kStage + (with_park ? Engine::kElements * Engine::kThreads : 0);
    return 2 * Engine::kSide * 8 + elements * static_cast<int64_t>(sizeof(T));
  }
};

// The rows of one factor of a tile as they are copied.
template <typename Engine>
struct TileRows {
  using T = typename Engine::Scalar;
  static constexpr int64_t kNoRow = INT64_MIN;  // beyond the matrix: zeros
  static constexpr int kVector = 16 / sizeof(T), kVectors = Engine::kDepth / kVector;
  static_assert(Engine::kSide * kVectors % Engine::kThreads == 0, "every thread copies as often");

  const T* data;
  int64_t column_stride;
  const int64_t* offsets;  // [kSide], in shared memory
  bool wide;               // 16 bytes at once: rows are dense and all of them aligned
  bool rows_fastest;       // neighbours in memory are rows

  // Fills `offsets`, which is read behind the next barrier.
  __device__ TileRows(const MatrixRows<T>& rows, int64_t* offsets)
      : data(rows.data),
        column_stride(rows.column_stride),
        offsets(offsets),
        rows_fastest(rows.rows_fastest()) {
    const int64_t strides = rows.sample_stride | (rows.c == 1 ? 0 : rows.output_stride);
    wide = column_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides % kVector == 0;
    for (int r = threadIdx.x; r < Engine::kSide; r += Engine::kThreads) {
      const typename MatrixRows<T>::Row row = rows.row(r);
      offsets[r] = row == nullptr ? kNoRow : row - data;
    }
  }

  __device__ T at(int r, int64_t k) const {
    return offsets[r] == kNoRow ? T(0) : data[offsets[r] + k * column_stride];
  }

  // Issues the copies of the columns [k0, k0 + kDepth) to a stage; those from `end` on are zero. k0 is a
  // multiple of kVector.
  __device__ void copy(T* stage, int64_t k0, int64_t end) const {
    if (wide) {
#pragma unroll
      for (int s = 0; s < Engine::kSide * kVectors / Engine::kThreads; ++s) {
        const int element = threadIdx.x + s * Engine::kThreads;
        const int r = element / kVectors, k = element % kVectors * kVector;
        const int64_t left = offsets[r] == kNoRow ? 0 : end - k0 - k;
        const int count = left <= 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
        copy_async<16>(stage + r * Engine::kLine + k, count == 0 ? data : data + offsets[r] + k0 + k,
                       count * static_cast<int>(sizeof(T)));
      }
      return;
    }
#pragma unroll 1  // addresses of an unrolled loop would sit in registers that the sums need
    for (int s = 0; s < Engine::kSide * Engine::kDepth / Engine::kThreads; ++s) {
      const int element = threadIdx.x + s * Engine::kThreads;
      const int r = rows_fastest ? element % Engine::kSide : element / Engine::kDepth;
      const int k = rows_fastest ? element / Engine::kSide : element % Engine::kDepth;
      const bool inside = offsets[r] != kNoRow && k0 + k < end;
      copy_async<sizeof(T)>(stage + r * Engine::kLine + k,
                            inside ? data + offsets[r] + (k0 + k) * column_stride : data,
                            inside ? static_cast<int>(sizeof(T)) : 0);
    }
  }
};

// engine = sum over the columns [begin, end) of rows that x and y copy: copy(stage, k0, end), as TileRows
// has it. All threads of the block must call it; `begin` is a multiple of 4. Behind it the stages may be
// overwritten.
template <typename Engine, typename Rows>
__device__ inline void stream_columns(Engine& engine, const TileMemory<Engine>& memory, const Rows& x,
                                      const Rows& y, int64_t begin, int64_t end) {
  constexpr int kStage = TileMemory<Engine>::kStage, kAhead = Engine::kStages - 1;
  engine.clear();
  __syncthreads();  // the offsets are there
  auto fetch = [&](int64_t k, int stage) {
    if (k < end) {
      x.copy(memory.x + stage * kStage, k, end);
      y.copy(memory.y + stage * kStage, k, end);
    }
    commit_copies();  // an empty group counts as well
  };
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) fetch(begin + stage * Engine::kDepth, stage);
  int stage = 0;
  for (int64_t k = begin; k < end; k += Engine::kDepth) {
    wait_copies<kAhead - 1>();
    __syncthreads();  // the stage is complete, and nobody reads the one that is fetched next
    fetch(k + kAhead * Engine::kDepth, stage == 0 ? kAhead : stage - 1);
    engine.step(memory.x + stage * kStage, memory.y + stage * kStage);
    stage = stage == kAhead ? 0 : stage + 1;
  }
  engine.finish();
  wait_copies<0>();
  __syncthreads();
}

// The same for rows of matrices.
template <typename Engine>
__device__ inline void tile_sum(Engine& engine, const TileMemory<Engine>& memory,
                                const MatrixRows<typename Engine::Scalar>& x_rows,
                                const MatrixRows<typename Engine::Scalar>& y_rows, int64_t begin,
                                int64_t end) {
  const TileRows<Engine> x(x_rows, memory.offsets), y(y_rows, memory.offsets + Engine::kSide);
  stream_columns(engine, memory, x, y, begin, end);
}

// The same for so few columns that stages do not pay: calls use(e, total) for every element e of the thread.
template <typename Engine, typename Use>
__device__ inline void narrow_sum(const Engine& engine, const TileMemory<Engine>& memory,
                                  const MatrixRows<typename Engine::Scalar>& x_rows,
                                  const MatrixRows<typename Engine::Scalar>& y_rows, int64_t end,
                                  const Use& use) {
  const TileRows<Engine> x(x_rows, memory.offsets), y(y_rows, memory.offsets + Engine::kSide);
  __syncthreads();
#pragma unroll 1
  for (int e = 0; e < Engine::kElements; ++e) {
    const int r = engine.row(e), s = engine.column(e);
    double total = 0.0;
    for (int64_t k = 0; k < end; ++k)
      total += static_cast<double>(x.at(r, k)) * static_cast<double>(y.at(s, k));
    use(e, total);
  }
  __syncthreads();
}

}  // namespace catapult::cuda
