// One row of logits z with label y, in terms of its competitors (the classes j != y):
//
//   R = max_j z_j     S = sum_j exp(z_j - R)     q_j = exp(z_j - R) / S     s = sum_j exp(z_j - z_y) = S exp(R - z_y)
//   phi = z_y - R - log S                        log-odds of the label       d phi / dz = e_y - q
//   nll = log1p(s) = softplus(-phi)              cross-entropy               d nll / dz = (1 - p_y) (q - e_y)
//   1 - p_y = s / (1 + s)
//
// The sum leaves the label out. A sum over all classes is 1 + s; where s is small, float32 has rounded s away in it,
// and with s the cross-entropy, the label's entry of the gradient and the log-odds.
#pragma once

#include <cmath>

#include "host_device.h"

namespace margin_kernels::math {

// Does class i with logit a come before class j with logit b? Larger first, equal logits: lowest class first.
template <class T>
MK_HOST_DEVICE bool comes_before(T a, int64_t i, T b, int64_t j) {
  return a > b || (a == b && i < j);
}

// Is a class with this logit masked? (NaN is not.)
template <class T>
MK_HOST_DEVICE bool is_masked(T z) {
  return z == -static_cast<T>(HUGE_VAL);
}

// z_i - z_y; -inf for a masked competitor, +inf for a masked label.
template <class T>
MK_HOST_DEVICE T gap(T z, T z_label) {
  return is_masked(z) ? z : z - z_label;
}

template <class T>
struct RowLosses {
  T nll, phi;
};

// nll and phi of a row from R and S. S = 0: no competitor is left.
template <class T>
MK_HOST_DEVICE RowLosses<T> row_losses(T z_label, T max, T sum) {
  const T infinite = static_cast<T>(HUGE_VAL);
  if (sum == T(0)) return {T(0), infinite};
  if (is_masked(z_label)) return {infinite, -infinite};
  const T lead = z_label - max, phi = lead - std::log(sum);
  if (lead >= T(0)) return {std::log1p(sum * std::exp(-lead)), phi};
  return {std::log(sum + std::exp(lead)) - lead, phi};
}

template <class T>
struct LabelProbability {
  T label, rest;  // p_y and 1 - p_y, each right where it is tiny
};

template <class T>
MK_HOST_DEVICE LabelProbability<T> label_probability(T z_label, T max, T sum) {
  const T lead = z_label - max, e = std::exp(lead >= T(0) ? -lead : lead);
  const T label = lead >= T(0) ? T(1) : e, rest = sum * (lead >= T(0) ? e : T(1));
  return {label / (label + rest), rest / (label + rest)};
}

// The mean of -log p_c over the finite classes, from their `count` finite competitors and
//   deficit = sum over these of R - z_j
template <class T>
MK_HOST_DEVICE T uniform_loss(T z_label, T max, T sum, T deficit, T count) {
  if (sum == T(0)) return T(0);
  if (is_masked(z_label)) return std::log(sum) + deficit / count;
  const T lead = z_label - max;
  if (lead >= T(0)) return std::log1p(sum * std::exp(-lead)) + (deficit + count * lead) / (count + T(1));
  return std::log(sum + std::exp(lead)) + (deficit - lead) / (count + T(1));
}

// The gradient of a row with S > 0: a competitor j gets other(q_j), the label gets label(); the gaps' part comes on
// top.
template <class T>
struct RowWeights {
  T of_others, of_label;  // factor of q_j; entry of the label but for `share`
  T share;                // every finite class loses grad_uniform / number of finite classes

  MK_HOST_DEVICE RowWeights(T grad_nll, T grad_phi, T grad_uniform, T z_label, T max, T sum, T count)
      : of_others(0), of_label(0), share(0) {
    // phi of a masked label is -inf: a margin without slope.
    if (is_masked(z_label)) grad_phi = T(0);
    if (grad_nll == T(0) && grad_phi == T(0) && grad_uniform == T(0)) return;
    const LabelProbability<T> p = label_probability(z_label, max, sum);
    const T weight = grad_nll * p.rest - grad_phi;
    of_others = weight + grad_uniform * p.rest;
    of_label = grad_uniform * p.label - weight;
    if (grad_uniform != T(0)) share = grad_uniform / count;
  }
  MK_HOST_DEVICE bool is_zero() const { return of_others == T(0) && of_label == T(0) && share == T(0); }
  MK_HOST_DEVICE T other(T q, bool masked) const { return of_others * q - (masked ? T(0) : share); }
  MK_HOST_DEVICE T label(bool masked) const { return of_label - (masked ? T(0) : share); }
};

}  // namespace margin_kernels::math
