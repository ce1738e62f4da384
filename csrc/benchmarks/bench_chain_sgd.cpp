#include <c10/core/InferenceMode.h>

#include "bench.h"
#include "core/chain_sgd.h"

namespace catapult::benchmarks {
namespace {

constexpr int64_t kSteps = 16;

// range(0) samples of a batch; range(1) layers of range(2) units behind 100 inputs, one output.
std::vector<at::Tensor> weights_of(const benchmark::State& state) {
  std::vector<at::Tensor> weights;
  int64_t in = 100;
  for (int64_t l = 1; l < state.range(1); ++l, in = state.range(2))
    weights.push_back(at::randn({state.range(2), in}));
  weights.push_back(at::randn({1, in}));
  return weights;
}

// The products of the steps: forward, back to all layers but the first, update.
double flop_of(const std::vector<at::Tensor>& weights, int64_t batch) {
  double flop = 0;
  for (std::size_t l = 0; l < weights.size(); ++l)
    flop += double(kSteps) * 2.0 * double(batch) * double(weights[l].numel()) * (l == 0 ? 2 : 3);
  return flop;
}

void catapult_chain_sgd(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t batch = state.range(0);
  const std::vector<at::Tensor> weights = weights_of(state);
  std::vector<ChainLayer> layers;
  for (const at::Tensor& w : weights)
    layers.push_back({w.size(1), w.size(0), w.data_ptr(), w.size(1), 1 / std::sqrt(double(w.size(1))),
                      nullptr, 1.0, true, false, 0.0});
  const at::Tensor x = at::randn({500, 100}), y = at::randn({500});
  const at::Tensor index = at::randint(500, {kSteps * batch}, at::kLong);
  const std::vector<int64_t> sizes(kSteps, batch);
  const std::vector<double> rates(kSteps, 1e-6);
  const std::vector<uint8_t> observed(kSteps, 1);
  std::vector<float> losses(kSteps), lambda_1(kSteps);
  for (auto _ : state) {
    chain_sgd({DType::kFloat32, layers.data(), static_cast<int64_t>(layers.size()), x.data_ptr(), 100,
               y.data_ptr(), 1, index.data_ptr<int64_t>(), sizes.data(), rates.data(), observed.data(),
               kSteps, 1e30, 1e-6, losses.data(), lambda_1.data()});
    benchmark::ClobberMemory();
  }
  report(state, flop_of(weights, batch));
}

// The products of the steps alone, into memory that is there.
void aten_products(benchmark::State& state) {
  const c10::InferenceMode guard;
  const int64_t batch = state.range(0);
  std::vector<at::Tensor> weights = weights_of(state), features{at::randn({batch, 100})}, sensitivities;
  for (const at::Tensor& w : weights) {
    features.push_back(at::empty({batch, w.size(0)}));
    sensitivities.push_back(at::randn({batch, w.size(0)}));
  }
  for (auto _ : state)
    for (int64_t step = 0; step < kSteps; ++step) {
      for (std::size_t l = 0; l < weights.size(); ++l)
        at::mm_out(features[l + 1], features[l], weights[l].t());
      for (std::size_t l = weights.size() - 1; l > 0; --l)
        at::mm_out(sensitivities[l - 1], sensitivities[l], weights[l]);
      for (std::size_t l = 0; l < weights.size(); ++l)
        weights[l].addmm_(sensitivities[l].t(), features[l], 1.0, -1e-9);
    }
  report(state, flop_of(weights, batch));
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"batch", "depth", "width"})->Unit(benchmark::kMicrosecond);
  for (int64_t batch : {5, 32}) b->Args({batch, 2, 1024})->Args({batch, 4, 256});
}

BENCHMARK(catapult_chain_sgd)->Name("chain_sgd/catapult")->Apply(sizes);
BENCHMARK(aten_products)->Name("chain_sgd/aten")->Apply(sizes);

}  // namespace
}  // namespace catapult::benchmarks
