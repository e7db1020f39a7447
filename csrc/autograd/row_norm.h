// Derivatives of || g ||_q over the last dimension, from the op's own slope and plain ATen: what is differentiated
// again where a Function's backward is itself a backward.  g [N, *, D], norm [N, *] without the last dimension.
#pragma once

#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "function.h"

namespace margin_kernels {

// H v = (q-1)/norm [ (|g|/norm)^(q-2) v - u <u, v> ];  0 where norm = 0, and for q < 2 the first term is 0 where g = 0
inline Tensor norm_curvature(const Tensor& g, const Tensor& norm, const Tensor& v, const Tensor& u_dot_v, double q) {
  const Tensor zero_row = (norm == 0).unsqueeze(-1);
  const Tensor d = at::where(zero_row, at::ones_like(norm).unsqueeze(-1), norm.unsqueeze(-1));
  const Tensor ratio = g / d, zero = ratio == 0;
  const Tensor magnitude = at::where(zero, at::ones_like(ratio), ratio.abs());
  const Tensor u = at::where(zero, at::zeros_like(ratio), ratio.sign() * magnitude.pow(q - 1));
  const Tensor diagonal = q == 2 ? at::ones_like(ratio) : at::where(zero, at::zeros_like(ratio), magnitude.pow(q - 2));
  const Tensor h = (diagonal * v - u * u_dot_v.unsqueeze(-1)) * (q - 1) / d;
  return at::where(zero_row, at::zeros_like(h), h);
}

}  // namespace margin_kernels
