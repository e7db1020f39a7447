// The bounded scores of the 1-to-N loss, the loss from A_y, and the derivatives. A logit of +inf counts as NaN; -inf is
// a masked class, bounded like any other: b = -delta.
//   a = min(z_y, delta),   b = max(z, -delta),   A_c = logsumexp of b over the samples of other classes
#pragma once

#include "host_device.h"

namespace margin_kernels::math {

template <class T>
MK_HOST_DEVICE bool is_masked_logit(T z) {
  return z == -static_cast<T>(HUGE_VAL);
}

template <class T>
MK_HOST_DEVICE T finite_or_nan(T z) {
  return is_masked_logit(z) ? z : z + (z - z);
}

// Both keep NaN; d a / d z = 1 where not z >= delta, d b / d z = 1 where not z <= -delta.
template <class T>
MK_HOST_DEVICE T bounded_label(T z, T delta) {
  const T x = finite_or_nan(z);
  return x >= delta ? delta : x;
}
template <class T>
MK_HOST_DEVICE T bounded_negative(T z, T delta) {
  const T x = finite_or_nan(z);
  return x <= -delta ? -delta : x;
}

template <class T>
MK_HOST_DEVICE T softplus(T x) {
  return x > T(0) ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <class T>
MK_HOST_DEVICE T sigmoid(T x) {
  if (x >= T(0)) return T(1) / (T(1) + std::exp(-x));
  const T e = std::exp(x);
  return e / (T(1) + e);
}

// s = d loss / d A = sigmoid(A - positive). positive: a, or the row's logsumexp with cross-entropy. A = -inf: 0.
template <class T>
MK_HOST_DEVICE T negative_share(T column, T positive) {
  return column == -static_cast<T>(HUGE_VAL) ? T(0) : sigmoid(column - positive);
}

// softplus(A - a), 0 where the class has no negatives
template <class T>
MK_HOST_DEVICE T one_to_n_loss(T column, T a) {
  return column == -static_cast<T>(HUGE_VAL) ? T(0) : softplus(column - a);
}

// logaddexp(A, l) - a with l the row's logsumexp
template <class T>
MK_HOST_DEVICE T one_to_n_cross_entropy_loss(T column, T row_logsumexp, T a) {
  if (is_masked_logit(row_logsumexp)) return column - a;  // every class of the row is masked
  return one_to_n_loss(column, row_logsumexp) + (row_logsumexp - a);
}

// d / d z[j,c] for y_j != c: total = S_c = sum of grad_i s_i over y_i = c, shift = A_c (- delta for "positive").
// A column that holds NaN has NaN for its shift, and NaN where z is above the bound.
template <class T>
MK_HOST_DEVICE T negative_gradient(T z, T delta, T total, T shift) {
  if (z <= -delta) return T(0);
  return total * std::exp(z - shift);
}

// d / d z[i, y_i], without the softmax part of cross-entropy. weight: s_i, or 1 with cross-entropy.
template <class T>
MK_HOST_DEVICE T label_part(T z, T delta, T grad, T weight) {
  if (is_masked_logit(z)) return -grad * weight;
  return z >= delta ? z - z : (z - z) - grad * weight;
}

// d / d z[i, k] through the row's logsumexp: grad (1 - s) softmax_k
template <class T>
MK_HOST_DEVICE T softmax_part(T z, T row_logsumexp, T grad, T share) {
  if (is_masked_logit(z) && row_logsumexp == row_logsumexp) return T(0);
  return grad * (T(1) - share) * std::exp(z - row_logsumexp);
}

}  // namespace margin_kernels::math
