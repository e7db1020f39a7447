// Signed distance d = -gap / (eps + norm), the clipped hinge on it, and the derivatives of both.
#pragma once

#include <string_view>

#include "host_device.h"

namespace margin_kernels::math {

enum class Aggregation { MAX, SUM, MEAN, MEAN_DISTANCE };

// The name as the op takes it, already checked; on the host.
inline Aggregation aggregation_of(std::string_view name) {
  if (name == "max") return Aggregation::MAX;
  if (name == "sum") return Aggregation::SUM;
  return name == "mean" ? Aggregation::MEAN : Aggregation::MEAN_DISTANCE;
}

// A gap of -inf (a masked competitor) is infinitely far on the right side, one of +inf (a masked label) on the wrong
// one, whatever the norm is.
template <class T>
MK_HOST_DEVICE T signed_distance(T gap, T norm, T eps) {
  if (std::fabs(gap) == static_cast<T>(HUGE_VAL)) return -gap;
  return -gap / (eps + norm);
}

// A pair that is left out: a masked competitor, or one whose norm is too small for its distance to mean anything.
template <class T>
MK_HOST_DEVICE bool left_out(T gap, T norm, T min_norm) {
  return gap == -static_cast<T>(HUGE_VAL) || (norm <= min_norm && gap == gap);  // a NaN gap stays
}

// Hyper-parameters on a device are not read by the host: a wrong one makes the loss NaN, through its layer's weight.
template <class T>
MK_HOST_DEVICE bool legal(T gamma, T cap, T weight) {
  return gamma >= T(0) && cap >= T(0) && weight >= T(0);
}

// Strict at both kinks; NaN counts as active, so that it stays NaN in value and gradient.
template <class T>
MK_HOST_DEVICE bool active(T distance, T gamma, T cap) {
  const T shortfall = gamma - distance;
  return !(shortfall <= T(0) || shortfall >= cap);
}

// min(max(gamma - d, 0), cap);   d term / d d = -1 where active, else 0
template <class T>
MK_HOST_DEVICE T term(T distance, T gamma, T cap) {
  const T shortfall = gamma - distance;
  if (shortfall <= T(0)) return T(0);
  return shortfall >= cap ? cap : shortfall;
}

// c d term / d gap = c / (eps + norm)           where active, with c the weight of the term in the loss
template <class T>
MK_HOST_DEVICE T gap_slope(T coefficient, T norm, T eps) {
  return coefficient / (eps + norm);
}

// c d term / d norm = -c gap / (eps + norm)^2   where active
template <class T>
MK_HOST_DEVICE T norm_slope(T coefficient, T gap, T norm, T eps) {
  const T inverse = T(1) / (eps + norm);
  if (inverse == T(0)) return T(0);  // an infinite norm, whose product with an infinite number would be NaN
  return -coefficient * gap * inverse * inverse;
}

}  // namespace margin_kernels::math
