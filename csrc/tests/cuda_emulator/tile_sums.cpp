// One tile of a product by each engine of gram_tile.cuh: what a whole op can only show at depths that take
// the emulator minutes.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/gram_tile.cuh"
#include "cuda/launch.h"
#include "cuda/ntk_gram_plan.h"

namespace py = pybind11;

namespace catapult::cuda {

namespace {

// What Tf32x3 would be if it left its sums inside the tensor cores.
struct Tf32x3InTensorCore : Tf32x3<kTile> {
  void step(const float* x, const float* y) {
    for (int k = 0; k < kDepth; k += 8)
      for (int i = 0; i < kDown; ++i)
        for (int j = 0; j < kAcross; ++j) {
          uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
          for (int q = 0; q < 4; ++q) split_tf32(x_element(x, i, k, q), a_high[q], a_low[q]);
          for (int q = 0; q < 2; ++q) split_tf32(y_element(y, j, k, q), b_high[q], b_low[q]);
          mma_tf32(sum[i][j], a_low, b_high, sum[i][j]);
          mma_tf32(sum[i][j], a_high, b_low, sum[i][j]);
          mma_tf32(sum[i][j], a_high, b_high, sum[i][j]);
        }
  }
};

template <typename T>
struct TileSum {
  MatrixRows<T> x, y;
  int64_t depth;
  T* result;  // [side, side]
};

template <typename Engine>
void tile_sum_kernel(TileSum<typename Engine::Scalar> arguments) {
  const TileMemory<Engine> memory;
  Engine engine;
  tile_sum(engine, memory, arguments.x, arguments.y, 0, arguments.depth);
  for (int e = 0; e < Engine::kElements; ++e)
    arguments.result[engine.row(e) * Engine::kSide + engine.column(e)] = engine.total(e);
}

// x and y [side, depth] contiguous; result [side, side].
template <typename Engine>
void tile_sum_of(std::uintptr_t x, std::uintptr_t y, int64_t depth, std::uintptr_t result) {
  using T = typename Engine::Scalar;
  auto rows = [&](std::uintptr_t data) {
    return MatrixRows<T>{reinterpret_cast<const T*>(data), depth, 0, 1, 1, 0, Engine::kSide};
  };
  Stream("tile_sum", 0, 0)
      .launch(tile_sum_kernel<Engine>, 1, Engine::kThreads, TileMemory<Engine>::bytes(false),
              TileSum<T>{rows(x), rows(y), depth, reinterpret_cast<T*>(result)});
}

}  // namespace

void bind_tile_sums(py::module_& module) {
  auto bind = [&](const char* engine, void (*call)(std::uintptr_t, std::uintptr_t, int64_t, std::uintptr_t)) {
    module.def((std::string("tile_sum_") + engine).c_str(), call);
  };
  bind("ffma_64", &tile_sum_of<Ffma<float, kTile>>);
  bind("ffma_128", &tile_sum_of<Ffma<float, kLargeTile>>);
  bind("ffma_float64", &tile_sum_of<Ffma<double, kTile>>);
  bind("tf32x3_64", &tile_sum_of<Tf32x3<kTile>>);
  bind("tf32x3_128", &tile_sum_of<Tf32x3<kLargeTile>>);
  bind("tf32x3_in_tensor_core", &tile_sum_of<Tf32x3InTensorCore>);
  bind("tensor_float64", &tile_sum_of<Float64>);
}

}  // namespace catapult::cuda
