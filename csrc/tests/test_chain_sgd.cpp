#include <algorithm>
#include <cstring>

#include "core/chain_sgd.h"
#include "test.h"

namespace catapult::tests {
namespace {

// A chain, its data and its batches; weights start at random and keep a gap behind each row.
template <typename T>
struct Problem {
  static constexpr int64_t kGap = 3;

  Problem(const std::vector<int64_t>& sizes, const std::vector<int64_t>& batches) : batch_sizes(batches) {
    for (std::size_t l = 0; l + 1 < sizes.size(); ++l) {
      weights.push_back(normal<T>(sizes[l + 1] * (sizes[l] + kGap), 10 + static_cast<unsigned>(l)));
      biases.push_back(normal<T>(sizes[l + 1], 20 + static_cast<unsigned>(l)));
      layers.push_back({sizes[l], sizes[l + 1], nullptr, sizes[l] + kGap, 1 / std::sqrt(double(sizes[l])),
                        nullptr, 0.3, l != 1, true, l % 2 == 0 ? 0.0 : 0.2});
    }
    d = sizes[0];
    x = normal<T>(kSamples * d, 1);
    y = normal<T>(kSamples, 2);
    std::mt19937_64 source(3);
    for (int64_t size : batches)
      for (int64_t i = 0; i < size; ++i) index.push_back(static_cast<int64_t>(source() % kSamples));
    rates.assign(batches.size(), 0.05);
    observed.assign(batches.size(), 1);
    losses = poison<T>(static_cast<int64_t>(batches.size()));
    lambda_1 = losses;
  }

  // Steps [first, first + count), writing to the parameters.
  int64_t run(int64_t first, int64_t count, double limit = 1e300) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      layers[l].weight = weights[l].data();
      layers[l].bias = biases[l].data();
    }
    int64_t skipped = 0;
    for (int64_t s = 0; s < first; ++s) skipped += batch_sizes[s];
    return chain_sgd({dtype_of<T>(), layers.data(), static_cast<int64_t>(layers.size()), x.data(), d,
                      y.data(), 1, index.data() + skipped, batch_sizes.data() + first, rates.data() + first,
                      observed.data() + first, count, limit, sizeof(T) == 8 ? 1e-12 : 1e-6,
                      losses.data() + first, lambda_1.data() + first});
  }

  // f at one sample, in double
  double output(int64_t sample) const {
    std::vector<double> a(d);
    for (int64_t k = 0; k < d; ++k) a[k] = double(x[sample * d + k]);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const ChainLayer& layer = layers[l];
      std::vector<double> z(layer.out);
      for (int64_t o = 0; o < layer.out; ++o) {
        for (int64_t k = 0; k < layer.in; ++k) z[o] += double(weights[l][o * layer.weight_stride + k]) * a[k];
        z[o] = layer.weight_scale * z[o] + layer.bias_scale * double(biases[l][o]);
        if (l + 1 < layers.size() && z[o] < 0) z[o] *= layer.slope;
      }
      a = z;
    }
    return a[0];
  }

  double loss(const int64_t* samples, int64_t count) const {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double r = output(samples[i]) - double(y[samples[i]]);
      sum += r * r;
    }
    return sum / double(count);
  }

  static constexpr int64_t kSamples = 23;
  int64_t d;
  std::vector<std::vector<T>> weights, biases;
  std::vector<ChainLayer> layers;
  std::vector<T> x, y, losses, lambda_1;
  std::vector<int64_t> index, batch_sizes;
  std::vector<double> rates;
  std::vector<uint8_t> observed;
};

// Differences of the loss, one parameter after the other: knows nothing of backward passes.
CATAPULT_TEST(chain_sgd_follows_the_gradient_of_the_loss) {
  for_each_simd_level([] {
    for (int64_t batch : {1, 5, 9}) {
      Problem<double> problem({6, 9, 4, 1}, {batch});
      const Problem<double> before = problem;
      EXPECT(problem.run(0, 1) == 1, "batch " << batch);
      const double loss = before.loss(before.index.data(), batch);
      EXPECT(std::fabs(problem.losses[0] - loss) <= 1e-13 * loss, problem.losses[0] << ", expected " << loss);
      Problem<double> moved = before;
      moved.layers = problem.layers;
      for (std::size_t l = 0; l < moved.weights.size(); ++l)
        for (std::size_t i = 0; i < moved.weights[l].size(); ++i) {
          const double kept = moved.weights[l][i], h = 1e-6;
          moved.weights[l][i] = kept + h;
          const double up = moved.loss(moved.index.data(), batch);
          moved.weights[l][i] = kept - h;
          const double down = moved.loss(moved.index.data(), batch);
          moved.weights[l][i] = kept;
          const double gradient = problem.layers[l].trains_weight ? (up - down) / (2 * h) : 0.0;
          const double step = problem.weights[l][i] - before.weights[l][i];
          EXPECT(std::fabs(step + 0.05 * gradient) <= 1e-8,
                 "layer " << l << ", entry " << i << ": moved by " << step << ", gradient " << gradient);
          if (gradient == 0.0) EXPECT(step == 0.0, "layer " << l << ", entry " << i << ": moved by " << step);
        }
    }
  });
}

template <typename T>
void check_cuts() {
  const std::vector<int64_t> sizes{12, 33, 17, 1}, batches{5, 5, 1, 8, 3, 32};
  Problem<T> whole(sizes, batches);
  EXPECT(whole.run(0, 6) == 6, "six steps");
  for (int64_t cut : {1, 2, 5}) {
    Problem<T> parts(sizes, batches);
    for (int64_t first = 0; first < 6; first += cut) parts.run(first, std::min<int64_t>(cut, 6 - first));
    EXPECT(parts.weights == whole.weights && parts.biases == whole.biases, "parameters, cut by " << cut);
    EXPECT(parts.losses == whole.losses && parts.lambda_1 == whole.lambda_1, "results, cut by " << cut);
  }
}

CATAPULT_TEST(chain_sgd_does_not_depend_on_how_steps_are_spread_over_calls) {
  for_each_simd_level([] {
    check_cuts<float>();
    check_cuts<double>();
  });
}

CATAPULT_TEST(chain_sgd_ends_before_a_loss_above_the_limit_or_not_finite) {
  for_each_simd_level([] {
    const std::vector<int64_t> sizes{7, 5, 1}, batches{4, 4, 4};
    Problem<float> two(sizes, batches), limited(sizes, batches), broken(sizes, batches);
    two.run(0, 3);
    const float third = two.losses[2];
    // The limit is passed by the first of the losses that is the largest.
    const float largest = std::max({two.losses[0], two.losses[1], third});
    int64_t expected = 0;
    while (two.losses[expected] < largest) ++expected;
    const int64_t made = limited.run(0, 3, double(largest) * (1 - 1e-6));
    EXPECT(made == expected, made << " steps, expected " << expected);
    EXPECT(limited.losses[made] == largest, limited.losses[made] << ", expected " << largest);

    for (float& value : broken.y) value = std::numeric_limits<float>::infinity();
    const Problem<float> before = broken;
    EXPECT(broken.run(0, 3) == 0, "no step");
    EXPECT(std::isnan(broken.losses[0]) && std::isnan(broken.lambda_1[2]), "results that were not computed");
    EXPECT(broken.weights == before.weights, "parameters moved");
  });
}

}  // namespace
}  // namespace catapult::tests
