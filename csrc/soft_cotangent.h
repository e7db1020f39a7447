// The direction in which the soft competitor's gap grows, as the passes start from it.
#pragma once

#include <ATen/core/Tensor.h>

namespace margin_kernels {

// d (-phi[n]) / d z[n,:] = q - e_y, a constant [N, C] in the dtype of the logits; 0 where `counted` is false. A masked
// label has no phi: there d nll[n] / d z[n,:], the same direction.
at::Tensor soft_cotangent(const at::Tensor& logits,    // [N, C]
                          const at::Tensor& target,    // [N]  int64
                          const at::Tensor& counted);  // [N]  bool

}  // namespace margin_kernels
