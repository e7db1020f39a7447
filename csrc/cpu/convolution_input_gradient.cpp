// The gradient at the input of a convolution with few input channels. The CPU library pads the input channels to a
// vector of 16, and col2im writes kh kw values for each one that it keeps; the kernel sums in registers and writes no
// columns.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "../ops.h"
#include "grain.h"

namespace margin_kernels {

struct ThinConvolution {
  int64_t outputs, inputs, kh, kw;  // of the weight
  int64_t h, w, gh, gw;             // of the input, of the output
  int64_t padding_h, padding_w, dilation_h, dilation_w;
};

}  // namespace margin_kernels

#define MK_KERNEL "convolution_input_gradient_kernel.h"
#include "foreach_isa.h"

namespace margin_kernels {
namespace {

Tensor convolution_input_gradient_cpu(const Tensor& gradient, const Tensor& weight, IntArrayRef padding,
                                      IntArrayRef dilation, IntArrayRef size) {
  check::convolution_input_gradient(gradient, weight, padding, dilation, c10::fromIntArrayRefSlow(size));
  const Tensor g = gradient.resolve_neg().contiguous(), w = weight.resolve_neg().contiguous();
  Tensor dx = at::empty({g.size(0), w.size(1), size[0], size[1]}, g.options().requires_grad(false));
  const ThinConvolution at{w.size(0), w.size(1), w.size(2),  w.size(3),  size[0],     size[1],
                           g.size(2), g.size(3), padding[0], padding[1], dilation[0], dilation[1]};
  const int64_t products = at.outputs * at.inputs * at.kh * at.kw * at.gh * at.gw;
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "convolution_input_gradient", [&] {
    at::parallel_for(0, g.size(0), grain(products, 500'000), [&](int64_t begin, int64_t end) {
      MK_DISPATCH(input_gradient_samples(at, g.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(), begin, end,
                                         dx.data_ptr<scalar_t>()));
    });
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) { m.impl("convolution_input_gradient", convolution_input_gradient_cpu); }

}  // namespace margin_kernels
