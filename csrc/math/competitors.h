// The order of competitors, and the derivative of gap and cross-entropy in the logits.
#pragma once

#include "host_device.h"

namespace margin_kernels::math {

// Does class i with logit a come before class j with logit b? Larger first, equal logits: lowest class first.
template <class T>
MK_HOST_DEVICE bool comes_before(T a, int64_t i, T b, int64_t j) {
  return a > b || (a == b && i < j);
}

// nll = log sum_i exp(z_i - max) - (z_y - max): the small numbers are subtracted, not the two large ones.
template <class T>
MK_HOST_DEVICE T negative_log_likelihood(T z_label, T max, T log_sum) {
  return log_sum + (max - z_label);
}

// softmax_i = exp(z_i - max - log_sum);   d nll / d z_i = softmax_i - [i = y]
template <class T>
MK_HOST_DEVICE T softmax(T z, T max, T log_sum) {
  return std::exp((z - max) - log_sum);
}

// Entry of the label: grad_nll (softmax_y - 1) - sum_j grad_gap_j
template <class T>
MK_HOST_DEVICE T label_gradient(T softmax_y, T grad_nll, T grad_gap_sum) {
  return grad_nll * (softmax_y - T(1)) - grad_gap_sum;
}

// Entry of competitor j: grad_nll softmax + grad_gap_j
template <class T>
MK_HOST_DEVICE T competitor_gradient(T softmax_i, T grad_nll, T grad_gap) {
  return grad_nll * softmax_i + grad_gap;
}

}  // namespace margin_kernels::math
