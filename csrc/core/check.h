// Two kinds of failure, kept apart: CATAPULT_CHECK is the caller's mistake and becomes a Python
// ValueError; CATAPULT_ASSERT is ours and becomes a RuntimeError that asks for a report.
#pragma once

#include <sstream>
#include <stdexcept>

namespace catapult {

struct InternalError : std::logic_error {
  using std::logic_error::logic_error;
};

}  // namespace catapult

#define CATAPULT_CHECK(condition, message)              \
  do {                                                  \
    if (!(condition)) {                                 \
      std::ostringstream catapult_text;                 \
      catapult_text << message;                         \
      throw std::invalid_argument(catapult_text.str()); \
    }                                                   \
  } while (0)

#define CATAPULT_ASSERT(condition)                                                               \
  do {                                                                                           \
    if (!(condition)) {                                                                          \
      std::ostringstream catapult_text;                                                          \
      catapult_text << "internal error at " << __FILE__ << ":" << __LINE__ << ": " << #condition \
                    << " does not hold; please report it";                                       \
      throw ::catapult::InternalError(catapult_text.str());                                      \
    }                                                                                            \
  } while (0)
