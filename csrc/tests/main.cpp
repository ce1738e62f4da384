#include "test.h"

namespace catapult::tests {

std::string& context() {
  static std::string text;
  return text;
}

}  // namespace catapult::tests

int main() {
  using namespace catapult::tests;
  int failed = 0;
  for (const Test& test : registry()) {
    const int before = failures();
    try {
      test.run();
    } catch (const std::exception& error) {
      std::printf("  exception: %s\n", error.what());
      ++failures();
    }
    const bool good = failures() == before;
    failed += !good;
    std::printf("%s %s\n", good ? "ok    " : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failed\n", registry().size(), failed);
  return registry().empty() || failed > 0 ? 1 : 0;
}
