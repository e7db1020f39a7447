// || g ||_q with q = p / (p - 1):  root(sum of power(g_i)), and its derivative.
#pragma once

#include <type_traits>

#include "host_device.h"

namespace margin_kernels::math {

// The cases that have a formula cheaper than pow. MAX: q = inf (p = 1), SUM: q = 1 (p = inf), SQUARE: q = 2 (p = 2),
// THREE_HALVES: q = 3/2 (p = 3), GENERAL: every other p > 1.
enum class Norm { MAX, SUM, SQUARE, THREE_HALVES, GENERAL };

MK_HOST_DEVICE double dual_exponent(double p) {
  if (p == 1) return HUGE_VAL;
  return p == HUGE_VAL ? 1 : p / (p - 1);
}

MK_HOST_DEVICE Norm norm_of(double p) {
  if (p == 1) return Norm::MAX;
  if (p == 2) return Norm::SQUARE;
  if (p == 3) return Norm::THREE_HALVES;
  return p == HUGE_VAL ? Norm::SUM : Norm::GENERAL;
}

// A ratio that is rounded to float32 is off by q of its roundings in its q-th power. Where q is large the derivatives of
// norms of float32 and smaller inputs, and on a GPU the norms, are computed in float64 from the start.
inline bool needs_float64(double p) { return norm_of(p) == Norm::GENERAL && dual_exponent(p) > 16; }

// body(std::integral_constant<Norm, norm>()) for the norm dual to l_p, on the host.
template <class Body>
void with_norm(double p, const Body& body) {
  switch (norm_of(p)) {
    case Norm::MAX:
      return body(std::integral_constant<Norm, Norm::MAX>());
    case Norm::SUM:
      return body(std::integral_constant<Norm, Norm::SUM>());
    case Norm::SQUARE:
      return body(std::integral_constant<Norm, Norm::SQUARE>());
    case Norm::THREE_HALVES:
      return body(std::integral_constant<Norm, Norm::THREE_HALVES>());
    case Norm::GENERAL:
      return body(std::integral_constant<Norm, Norm::GENERAL>());
  }
}

// |g|^q for a magnitude m = |g| (not for MAX, whose "sum" is a maximum)
template <Norm norm, class T>
MK_HOST_DEVICE T power(T m, T q) {
  if constexpr (norm == Norm::SUM) return m;
  if constexpr (norm == Norm::SQUARE) return m * m;
  if constexpr (norm == Norm::THREE_HALVES) return m * std::sqrt(m);
  return std::pow(m, q);
}

// sum^(1/q)
template <Norm norm, class T>
MK_HOST_DEVICE T root(T sum, T q) {
  if constexpr (norm == Norm::SUM || norm == Norm::MAX) return sum;
  if constexpr (norm == Norm::SQUARE) return std::sqrt(sum);
  if constexpr (norm == Norm::THREE_HALVES) {
    const T r = std::cbrt(sum);
    return r * r;
  }
  return std::pow(sum, T(1) / q);
}

// d norm / d g = sign(g) (|g| / norm)^(q-1); the caller handles norm = 0 (derivative 0) and MAX (even split over ties).
template <Norm norm, class T>
MK_HOST_DEVICE T slope(T g, T n, T q) {
  const T sign = g > T(0) ? T(1) : (g < T(0) ? T(-1) : g);  // keeps 0 and NaN
  if constexpr (norm == Norm::SUM) return sign;
  if constexpr (norm == Norm::SQUARE) return g / n;
  const T ratio = std::fabs(g) / n;
  if constexpr (norm == Norm::THREE_HALVES) return sign * std::sqrt(ratio);
  return sign * std::pow(ratio, q - T(1));
}

}  // namespace margin_kernels::math
