// Which terms of margin_hinge take part, and which are left out.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace margin_kernels {

// For tensors of the CPU. (active, degenerate), bool [N, k, L]:
//   degenerate = norm <= min_norm_l, the gap not NaN, in a row that is valid
//   active     = 0 < gamma_l - distance < cap_l, not degenerate, in a row that is valid
std::pair<at::Tensor, at::Tensor> margin_flags(const at::Tensor& gap,       // [N, k]
                                               const at::Tensor& norm,      // [N, k, L]
                                               const at::Tensor& distance,  // [N, k, L]  the wider type of the two
                                               const at::Tensor& gamma,     // [L]
                                               const at::Tensor& cap,       // [L]
                                               const at::Tensor& min_norm,  // [L]
                                               const at::Tensor& valid);    // [N]  bool

}  // namespace margin_kernels
