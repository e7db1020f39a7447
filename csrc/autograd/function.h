// What every autograd Function here needs.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../check.h"
#include "../ops.h"

namespace margin_kernels {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Inside forward: calls go to the kernels, below autograd.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// Without a graph to build the Function is left out: it costs a microsecond.
inline bool needs_graph(TensorList inputs) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& t : inputs) {
    if (t.requires_grad()) return true;
  }
  return false;
}

inline std::optional<Tensor> if_defined(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

}  // namespace margin_kernels
