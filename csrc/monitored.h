// What an ordinary step of cross-entropy shows of margins, on the CPU: for MarginMonitor, whose formulas these are in
// one call each, for operations on N numbers cost more than the arithmetic in them.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace margin_kernels {

// What the gradient g [N, C] of logits z [N, C] shows of each sample, [N, 7] acc. With y the label, given or the lowest
// entry of g: s = -g_y / (1 - p_y), phi, 1 - p_y, whether that is known, whether g is that of another loss, ||g||_q, 1.
//   r = sum_{j != y} |g_j - s p_j|     known: g_y < 0 and r <= known |g_y|
//   another loss: g_y < 0 and r > other |g_y| + rounding s, or g_y > rounding sum_j |g_j|; never known, nor another
//   loss, where a given label lies outside [0, C)
at::Tensor read_logit_gradient(const at::Tensor& g, const at::Tensor& z,
                               const std::optional<at::Tensor>& given,  // [N]  int64
                               double p, double known, double other, double rounding);

// d[n, l] = phi s (1 - p_y) / (eps s (1 - p_y) + norms_l[n]), NaN where the sample is not known, the norm not finite or
// at most least_l; and how many samples had another loss.
std::tuple<at::Tensor, int64_t>                          // [N, L]
monitored_margins(const at::Tensor& found,               // [N, 7], of read_logit_gradient
                  const std::vector<at::Tensor>& norms,  // L times [N]
                  const std::vector<double>& least,      // [L]
                  double eps);

}  // namespace margin_kernels
