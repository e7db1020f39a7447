// Every op of the library, as a call into the dispatcher: differentiable, traceable, chosen by device.
// q = p / (p - 1). "acc" is float64 for float64 inputs and float32 for all others.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

namespace margin_kernels {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;
using c10::SymIntArrayRef;

// index = top-k classes without the label, gap = z[index] - z[target], nll = cross-entropy,
// phi = z[target] - logsumexp of the others, uniform = mean over the finite classes of -log p. On the CPU logits may be
// [N, C, S], predictions at S positions: row n S + s holds logits[n, :, s], and N stands for N S in all other shapes.
std::tuple<Tensor,                 // gap        [N, k]  acc
           Tensor,                 // nll        [N]     acc
           Tensor,                 // phi        [N]     acc
           Tensor,                 // uniform    [N]     acc, or empty [0] unless asked for
           Tensor,                 // index      [N, k]  int64
           Tensor,                 // normalizer [N, 3]  acc: R, S of math/competitors.h and the number of finite
                                   //            classes (0 unless uniform); S = 0: no gradient, NaN: all NaN
           Tensor>                 // valid      [N]     bool: target != ignore_index
competitors(const Tensor& logits,  // [N, C]
            const Tensor& target,  // [N]  int64
            int64_t k,
            int64_t ignore_index,  // rows with this target: all 0
            bool uniform);

// dlogits = (grad_nll + grad_uniform) (softmax - e_target) + grad_phi (e_target - q)
//           + grad_uniform (e_target - 1 / M) + sum_j grad_gap_j (e_index_j - e_target)
Tensor                                                           // [N, C]  dtype of logits
competitors_backward(const std::optional<Tensor>& grad_gap,      // [N, k]
                     const std::optional<Tensor>& grad_nll,      // [N]
                     const std::optional<Tensor>& grad_phi,      // [N]
                     const std::optional<Tensor>& grad_uniform,  // [N]
                     const Tensor& logits,                       // [N, C]
                     const Tensor& target,                       // [N]
                     const Tensor& index,                        // [N, k]
                     const Tensor& normalizer);                  // [N, 3]

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

// norm[n, j] = || rows[index[n, j]] - rows[target[n]] ||_q
Tensor                              // [N, k]  acc
row_distance(const Tensor& rows,    // [C, D]
             const Tensor& index,   // [N, k]  int64
             const Tensor& target,  // [N]     int64
             double p);

// drows[index[n, j]] += grad slope,  drows[target[n]] -= grad slope
Tensor                                     // [C, D]  dtype of rows
row_distance_backward(const Tensor& grad,  // [N, k]
                      const Tensor& rows, const Tensor& index, const Tensor& target,
                      const Tensor& norm,  // [N, k]
                      double p);

// distance = -gap / (eps + norm); loss = over_l over_j min(max(gamma_l - distance, 0), cap_l)
// left out, with term and slope 0: pairs with gap = -inf or norm <= min_norm_l
// over l: "sum" = sum_l weight_l t_l, "mean" = sum_l weight_l t_l / sum_l weight_l
std::tuple<Tensor,                                   // loss     [N]        acc
           Tensor>                                   // distance [N, k, L]  acc, no gradient
margin_hinge(const Tensor& gap,                      // [N, k]
             const Tensor& norm,                     // [N, k, L]
             const Tensor& gamma,                    // [L]
             const std::optional<Tensor>& cap,       // [L], infinity by default
             const std::optional<Tensor>& weight,    // [L], 1 by default
             const std::optional<Tensor>& min_norm,  // [L], none by default
             double eps, std::string_view aggregation, std::string_view layer_reduction);

std::tuple<Tensor,                         // grad of gap   [N, k]
           Tensor>                         // grad of norm  [N, k, L], or empty [0] unless norm_grad
margin_hinge_backward(const Tensor& grad,  // [N]
                      const Tensor& gap, const Tensor& norm, const Tensor& gamma, const std::optional<Tensor>& cap,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& min_norm, double eps,
                      std::string_view aggregation, std::string_view layer_reduction, bool norm_grad);

// A_c = logsumexp over j with y_j != c of max(z[j, c], -delta), + delta for bound = "positive"
// loss_i = softplus(A_{y_i} - a_i), a_i = min(z[i, y_i], delta); with cross_entropy logaddexp(A_{y_i}, lse_i) - a_i
std::tuple<Tensor,              // loss        [N]  acc
           Tensor,              // column      [C]  acc: A, -inf without negatives; kept for backward
           Tensor>              // normalizer  [N]  acc: row logsumexp, or empty [0] without cross_entropy
one_to_n(const Tensor& logits,  // [N, C]
         const Tensor& target,  // [N]  int64
         double delta, std::string_view bound, bool cross_entropy);

// y_j != c: S_c exp(max(z, -delta) - A_c) 1[z > -delta], S_c = sum of grad_i s_i over y_i = c;  y_i: -grad_i s_i
Tensor                                 // [N, C]  dtype of logits
one_to_n_backward(const Tensor& grad,  // [N]
                  const Tensor& logits, const Tensor& target,
                  const Tensor& column,      // [C]
                  const Tensor& normalizer,  // [N] or [0]
                  double delta, std::string_view bound, bool cross_entropy);

// distance_j = |gap_j| / ||w_j||_q, choice = argmin_j, step = distance u with u = d ||w|| / d w of the chosen j
std::tuple<Tensor,                                  // step      [N, *]  dtype of gradients
           Tensor,                                  // distance  [N]     acc
           Tensor,                                  // choice    [N]     int64
           Tensor>                                  // norm      [N]     acc: of the chosen j; kept for backward
deepfool_step(const Tensor& gap,                    // [N, k]
              const Tensor& gradients,              // [N, k, *]
              const std::optional<Tensor>& active,  // [N]  bool, all by default
              double p);

std::tuple<Tensor,                                                  // grad of gap        [N, k]
           Tensor>                                                  // grad of gradients  [N, k, *]
deepfool_step_backward(const std::optional<Tensor>& grad_step,      // [N, *]
                       const std::optional<Tensor>& grad_distance,  // [N]
                       const Tensor& gap, const Tensor& gradients,
                       const Tensor& choice,  // [N]
                       const Tensor& norm,    // [N]
                       const std::optional<Tensor>& active, double p);

// The gradient at the input of a convolution with stride 1 and one group; used by gradients/thin_convolution.py, CPU
// only. dx[n,ci,i,j] = sum_{co,a,b} W[co,ci,a,b] g[n,co, i + padding_h - a dilation_h, j + padding_w - b dilation_w]
Tensor                                              // [N, Ci, H, W']
convolution_input_gradient(const Tensor& gradient,  // [N, Co, H + 2 padding_h - (kh - 1) dilation_h, *]
                           const Tensor& weight,    // [Co, Ci, kh, kw]  float32 or float64, as gradient
                           IntArrayRef padding, IntArrayRef dilation,
                           SymIntArrayRef size);  // (H, W')

}  // namespace margin_kernels
