// One DeepFool step for the nearest boundary: w the gradient of its gap, n = ||w||_q, d = |gap| / n, step = d u with
// u = d n / d w (slope of dual_norm.h). With t = grad_distance + <grad_step, u>:
//   dgap = sign(gap) t / n,   dw = -(d / n) t u + d H grad_step
//   H v = (q-1) / n (diag((|w| / n)^(q-2)) v - u <u, v>),  0 for q = 1 and q = inf
#pragma once

#include "dual_norm.h"

namespace margin_kernels::math {

// A candidate of a masked class: its gap is infinite, and so is its distance.
template <class T>
MK_HOST_DEVICE bool is_masked_gap(T gap) {
  return std::fabs(gap) == static_cast<T>(HUGE_VAL);
}

// |gap| / n, infinity where n = 0 and for a masked class
template <class T>
MK_HOST_DEVICE T boundary_distance(T gap, T n) {
  return n == T(0) || is_masked_gap(gap) ? static_cast<T>(HUGE_VAL) : std::fabs(gap) / n;
}

// -1, 0 or 1; keeps NaN
template <class T>
MK_HOST_DEVICE T sign(T x) {
  return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x);
}

// (|w_i| / n)^(q-2), 0 at w_i = 0 except for q = 2
template <Norm norm, class T>
MK_HOST_DEVICE T diagonal(T w, T n, T q) {
  if constexpr (norm == Norm::SQUARE) return T(1);
  if (w == T(0)) return T(0);
  const T ratio = std::fabs(w) / n;
  if constexpr (norm == Norm::THREE_HALVES) return T(1) / std::sqrt(ratio);
  return std::pow(ratio, q - T(2));
}

template <class T>
MK_HOST_DEVICE T gap_gradient(T gap, T n, T t) {
  return n == T(0) ? T(0) : sign(gap) * t / n;
}

// Element i of dw, n > 0: u = u_i, v = grad_step_i, u_dot_v = <u, grad_step>
template <Norm norm, class T>
MK_HOST_DEVICE T row_gradient(T w, T u, T v, T n, T q, T distance, T t, T u_dot_v) {
  const T along = -distance / n * t * u;
  if constexpr (norm == Norm::SUM || norm == Norm::MAX) return along;
  return along + distance * (q - T(1)) / n * (diagonal<norm>(w, n, q) * v - u * u_dot_v);
}

}  // namespace margin_kernels::math
