// Bilinear in the gradient g and the weight W. Along v, which arrives at dx = W^T g:
//   dg = conv(v, W),   dW = the weight gradient of a convolution with input v and gradient g.
// Both are PyTorch's own operations, so they can be differentiated again.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include <tuple>
#include <vector>

#include "function.h"

namespace margin_kernels {
namespace {

struct ConvolutionInputGradientFunction : Function<ConvolutionInputGradientFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gradient, const Tensor& weight, IntArrayRef padding,
                        IntArrayRef dilation, SymIntArrayRef size) {
    BelowAutograd guard;
    ctx->save_for_backward({gradient, weight});
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    return convolution_input_gradient(gradient, weight, padding, dilation, size);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = saved[0], &weight = saved[1], &v = grads[0];
    const auto padding = ctx->saved_data["padding"].toIntVector(), dilation = ctx->saved_data["dilation"].toIntVector();
    const std::vector<int64_t> one{1, 1}, none{0, 0};
    variable_list result(5);
    if (ctx->needs_input_grad(0)) {
      result[0] = at::convolution(v, weight, {}, one, padding, dilation, /*transposed=*/false, none, /*groups=*/1);
    }
    if (ctx->needs_input_grad(1)) {
      result[1] = std::get<1>(at::convolution_backward(gradient, v, weight, {}, one, padding, dilation,
                                                       /*transposed=*/false, none, /*groups=*/1, {false, true, false}));
    }
    return result;
  }
};

Tensor convolution_input_gradient_autograd(const Tensor& gradient, const Tensor& weight, IntArrayRef padding,
                                           IntArrayRef dilation, SymIntArrayRef size) {
  if (!needs_graph({gradient, weight})) {
    BelowAutograd guard;
    return convolution_input_gradient(gradient, weight, padding, dilation, size);
  }
  return ConvolutionInputGradientFunction::apply(gradient, weight, padding, dilation, size);
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("convolution_input_gradient", convolution_input_gradient_autograd);
}

}  // namespace margin_kernels
