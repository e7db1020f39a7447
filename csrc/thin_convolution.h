// The gradient at the input of a convolution with few input channels, stride 1 and one group, straight from that in its
// output: dx[n,ci,i,j] = sum_{co,a,b} W[co,ci,a,b] g[n,co, i + padding_h - a dilation_h, j + padding_w - b dilation_w].
//
// The CPU library pads the input channels to a vector of 16, and col2im writes kh kw values for each one that it keeps.
// No dispatcher op, and not differentiable: margin_kernels/thin_convolution.py calls it where no graph is asked for.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace margin_kernels {

using at::Tensor;

Tensor                                              // [N, Ci, H, W]
convolution_input_gradient(const Tensor& gradient,  // [N, Co, H + 2 padding_h - (kh - 1) dilation_h, *]
                           const Tensor& weight,    // [Co, Ci, kh, kw]  float32 or float64, as gradient
                           std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation,
                           std::array<int64_t, 2> size);  // (H, W)

}  // namespace margin_kernels
