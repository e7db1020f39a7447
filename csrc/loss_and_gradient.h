// The large-margin loss of one step on the CPU and its gradient in the logits, for norms that are constants: what the
// ops of ops.h and their graph would give one by one, in two calls around the passes that measure the norms.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

namespace margin_kernels {

// What a step knows before its passes, all constants: `competitors` of the logits, and with `soft` the one competitor
// of all rivals, whose gap is -phi, with the direction of its pass.
std::tuple<at::Tensor,                 // gap         [N, k]  acc;  [N, 1] with soft
           at::Tensor,                 // nll         [N]     acc
           at::Tensor,                 // index       [N, k]  int64
           at::Tensor,                 // normalizer  [N, 3]  acc
           at::Tensor,                 // valid       [N]     bool
           at::Tensor>                 // direction   [N, C], see soft_cotangent.h; empty [0] without soft
ranked_once(const at::Tensor& logits,  // [N, C]
            const at::Tensor& target,  // [N]  int64
            int64_t k, int64_t ignore_index, bool soft);

// The numbers of a loss.
struct HingeNumbers {
  std::vector<double> gamma, cap, weight, min_norm;  // [L]
  double eps, margin_weight, cross_entropy_weight;
};

// loss = over n of (margin_weight hinge_n + cross_entropy_weight nll_n), its mean over the valid rows or its sum;
// gradient = d loss / d logits, weight[n, j] = d loss / d gap[n, j] if the loss depended on the network by gaps alone:
// entry `index` of the gradient; with soft minus entry `target`
std::tuple<at::Tensor,                           // loss        []         acc
           at::Tensor,                           // gradient    [N, C]     dtype of logits
           at::Tensor,                           // weight      [N, k]
           at::Tensor,                           // distance    [N, k, L]  acc
           at::Tensor,                           // active      [N, k, L]  bool, see margin_flags.h
           at::Tensor>                           // degenerate  [N, k, L]  bool
loss_and_gradient(const at::Tensor& logits,      // [N, C]
                  const at::Tensor& target,      // [N]
                  const at::Tensor& gap,         // [N, k]
                  const at::Tensor& nll,         // [N]
                  const at::Tensor& index,       // [N, k]
                  const at::Tensor& normalizer,  // [N, 3]
                  const at::Tensor& valid,       // [N]
                  const at::Tensor& norm,        // [N, k, L]
                  const HingeNumbers& numbers, std::string_view aggregation, std::string_view layer_reduction,
                  bool mean, bool soft);

}  // namespace margin_kernels
