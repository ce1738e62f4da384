#include <stdexcept>

#include "core/check.h"
#include "core/parallel.h"
#include "test.h"

namespace catapult::tests {
namespace {

CATAPULT_TEST(parallel_workers_runs_every_share_once) {
  for (int threads : {0, 1, 2, 7, 40}) {
    std::vector<int> runs(threads < 1 ? 1 : threads);
    int workers_seen = 0;
    parallel_workers(threads, [&](int worker, int workers) {
      ++runs[worker];
      if (worker == 0) workers_seen = workers;
    });
    EXPECT(workers_seen == static_cast<int>(runs.size()), threads << " threads");
    for (int count : runs) EXPECT(count == 1, threads << " threads");
  }
}

CATAPULT_TEST(simd_levels) {
  EXPECT(!available_simd_levels().empty() && available_simd_levels()[0] == SimdLevel::kScalar, "");
  for_each_simd_level([] { EXPECT(context() == simd_name(simd_level()), simd_name(simd_level())); });
  bool refused = false;
  try {
    set_simd_level("sse9");
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("CATAPULT_SIMD: expected one of scalar") == 0 &&
              std::string(error.what()).find("got 'sse9'") != std::string::npos;
  }
  EXPECT(refused, "");
}

CATAPULT_TEST(two_kinds_of_failure) {
  std::string caller, ours;
  try {
    CATAPULT_CHECK(1 > 2, "size: expected " << 3 << ", got " << 4);
  } catch (const std::invalid_argument& error) {
    caller = error.what();
  }
  try {
    CATAPULT_ASSERT(1 > 2);
  } catch (const InternalError& error) {
    ours = error.what();
  }
  EXPECT(caller == "size: expected 3, got 4", caller);
  EXPECT(ours.find("1 > 2 does not hold") != std::string::npos, ours);
}

}  // namespace
}  // namespace catapult::tests
