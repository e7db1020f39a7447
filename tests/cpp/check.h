// The smallest test harness that says what differed: EXPECT(condition), EXPECT_NEAR(actual, expected, relative).
#pragma once

#include <cmath>
#include <cstdio>

inline int failures = 0;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                          \
    }                                                                      \
  } while (0)

#define EXPECT_NEAR(actual, expected, relative)                                                                  \
  do {                                                                                                           \
    const double a_ = (actual), e_ = (expected);                                                                 \
    if (!(std::fabs(a_ - e_) <= (relative) * std::fabs(e_) || a_ == e_ || (std::isnan(a_) && std::isnan(e_)))) { \
      std::printf("%s:%d: %s = %.17g, expected %.17g\n", __FILE__, __LINE__, #actual, a_, e_);                   \
      ++failures;                                                                                                \
    }                                                                                                            \
  } while (0)

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}
