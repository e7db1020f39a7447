// Every op of the library, as a call into the dispatcher: differentiable, traceable, chosen by device.
// q = p / (p - 1). "acc" is float64 for float64 inputs and float32 for all others.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

namespace margin_kernels {

using at::Tensor;
using at::TensorList;

// index = top-k classes without the label, gap = z[index] - z[target], nll = cross-entropy
std::tuple<Tensor,                 // gap        [N, k]  acc
           Tensor,                 // nll        [N]     acc
           Tensor,                 // index      [N, k]  int64
           Tensor>                 // normalizer [N, 2]  acc: max_i z_i, log sum_i exp(z_i - max); kept for backward
competitors(const Tensor& logits,  // [N, C]
            const Tensor& target,  // [N]  int64
            int64_t k);

// dlogits = grad_nll (softmax - e_target) + sum_j grad_gap_j (e_index_j - e_target)
Tensor                                                       // [N, C]  dtype of logits
competitors_backward(const std::optional<Tensor>& grad_gap,  // [N, k]
                     const std::optional<Tensor>& grad_nll,  // [N]
                     const Tensor& logits,                   // [N, C]
                     const Tensor& target,                   // [N]
                     const Tensor& index,                    // [N, k]
                     const Tensor& normalizer);              // [N, 2]

// norms[..., l] = || gradients[l][..., :] ||_q
Tensor                           // [N, k, L] (batch_dims = 2) or [N, L] (batch_dims = 1)  acc
dual_norm(TensorList gradients,  // L tensors [N, k, *] or [N, *]
          double p, int64_t batch_dims);

// sign(G) |G|^(q-1) / norm^(q-1) * grad
std::vector<Tensor>                       // like gradients
dual_norm_backward(const Tensor& grad,    // [N, k, L] or [N, L]
                   TensorList gradients,  // L tensors
                   const Tensor& norms,   // like grad
                   double p, int64_t batch_dims);

// distance = -gap / (eps + norm); loss = over_l over_j min(max(gamma_l - distance, 0), cap_l)
// over l: "sum" = sum_l weight_l t_l, "mean" = sum_l weight_l t_l / sum_l weight_l
std::tuple<Tensor,                                 // loss     [N]        acc
           Tensor>                                 // distance [N, k, L]  acc, no gradient
margin_hinge(const Tensor& gap,                    // [N, k]
             const Tensor& norm,                   // [N, k, L]
             const Tensor& gamma,                  // [L]
             const std::optional<Tensor>& cap,     // [L], infinity by default
             const std::optional<Tensor>& weight,  // [L], 1 by default
             double eps, std::string_view aggregation, std::string_view layer_reduction);

std::tuple<Tensor,                         // grad of gap   [N, k]
           Tensor>                         // grad of norm  [N, k, L], or empty [0] unless norm_grad
margin_hinge_backward(const Tensor& grad,  // [N]
                      const Tensor& gap, const Tensor& norm, const Tensor& gamma, const std::optional<Tensor>& cap,
                      const std::optional<Tensor>& weight, double eps, std::string_view aggregation,
                      std::string_view layer_reduction, bool norm_grad);

}  // namespace margin_kernels
