// What the tests of device code share: tensors as a kernel sees them, and comparison with the op on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <string>

#include "check.h"

constexpr double inf = std::numeric_limits<double>::infinity(), nan_value = std::numeric_limits<double>::quiet_NaN();

// An output starts as NaN: what a kernel leaves out shows.
inline at::Tensor unwritten(at::IntArrayRef sizes, at::ScalarType type) { return at::full(sizes, nan_value, type); }

// The same values one element behind a multiple of 16 bytes, in an allocation that ends with them.
inline at::Tensor misaligned(const at::Tensor& t) {
  at::Tensor shifted = at::empty({t.numel() + 1}, t.options()).narrow(0, 1, t.numel()).view(t.sizes());
  return shifted.copy_(t);
}

// |actual - expected| <= tolerance (|expected| + scale); NaN and infinity in the same places.
inline void expect_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance,
                         const std::string& where, double scale = 0) {
  const at::Tensor a = actual.to(at::kDouble), e = expected.to(at::kDouble);
  const at::Tensor same = (a == e).logical_or(a.isnan().logical_and(e.isnan()));
  const at::Tensor close = same.logical_or((a - e).abs() <= tolerance * (e.abs() + scale));
  const bool all = close.all().item<bool>();
  if (!all) {
    const at::Tensor at = close.logical_not().flatten().nonzero()[0][0];
    std::printf("%s differs at %ld of %ld: %.9g, expected %.9g\n", where.c_str(), long(at.item<int64_t>()),
                long(a.numel()), a.flatten()[at].item<double>(), e.flatten()[at].item<double>());
  }
  EXPECT(all);
}

inline void expect_same_bits(const at::Tensor& actual, const at::Tensor& expected, const std::string& where) {
  const bool same = at::equal(at::nan_to_num(actual, 1.5, 2.5e4, -2.5e4), at::nan_to_num(expected, 1.5, 2.5e4, -2.5e4));
  if (!same) std::printf("%s differs\n", where.c_str());
  EXPECT(same);
}
