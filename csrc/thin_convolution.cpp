#include "thin_convolution.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "check.h"

namespace margin_kernels {

struct ThinConvolution {
  int64_t outputs, inputs, kh, kw;  // of the weight
  int64_t h, w, gh, gw;             // of the input, of the output
  int64_t padding_h, padding_w, dilation_h, dilation_w;
};

}  // namespace margin_kernels

#define MK_KERNEL "thin_convolution_kernel.h"
#include "cpu/foreach_isa.h"

namespace margin_kernels {
namespace {

// Samples per task: at least half a million products.
int64_t grain(const ThinConvolution& at) {
  const int64_t products = at.outputs * at.inputs * at.kh * at.kw * at.gh * at.gw;
  return std::max<int64_t>(1, 500'000 / std::max<int64_t>(products, 1));
}

void check_arguments(const Tensor& gradient, const Tensor& weight, std::array<int64_t, 2> padding,
                     std::array<int64_t, 2> dilation, std::array<int64_t, 2> size) {
  const auto type = gradient.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, "gradient must be float32 or float64, got ",
                   check::name_of(type));
  TORCH_CHECK_TYPE(weight.scalar_type() == type, "weight must be ", check::name_of(type), " like gradient, got ",
                   check::name_of(weight.scalar_type()));
  TORCH_CHECK_VALUE(gradient.device().is_cpu() && weight.device().is_cpu(), "gradient and weight must be on the CPU, ",
                    "got ", gradient.device(), " and ", weight.device());
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.numel() > 0, "weight must have shape [Co, Ci, kh, kw], got ",
                    weight.sizes());
  std::array<int64_t, 2> output;
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(padding[d] >= 0, "padding must not be negative, got ", padding[d]);
    TORCH_CHECK_VALUE(dilation[d] >= 1, "dilation must be at least 1, got ", dilation[d]);
    output[d] = size[d] + 2 * padding[d] - (weight.size(2 + d) - 1) * dilation[d];
    TORCH_CHECK_VALUE(size[d] >= 1 && output[d] >= 1, "size ", at::IntArrayRef(size),
                      " gives no output of a kernel of shape ", weight.sizes());
  }
  TORCH_CHECK_VALUE(gradient.dim() == 4 && gradient.size(1) == weight.size(0) && gradient.size(2) == output[0] &&
                        gradient.size(3) == output[1],
                    "gradient must have shape [N, ", weight.size(0), ", ", output[0], ", ", output[1], "], got ",
                    gradient.sizes());
}

}  // namespace

Tensor convolution_input_gradient(const Tensor& gradient, const Tensor& weight, std::array<int64_t, 2> padding,
                                  std::array<int64_t, 2> dilation, std::array<int64_t, 2> size) {
  check_arguments(gradient, weight, padding, dilation, size);
  const Tensor g = gradient.resolve_neg().contiguous(), w = weight.resolve_neg().contiguous();
  Tensor dx = at::empty({g.size(0), w.size(1), size[0], size[1]}, g.options().requires_grad(false));
  const ThinConvolution at{w.size(0), w.size(1), w.size(2),  w.size(3),  size[0],     size[1],
                           g.size(2), g.size(3), padding[0], padding[1], dilation[0], dilation[1]};
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "convolution_input_gradient", [&] {
    at::parallel_for(0, g.size(0), grain(at), [&](int64_t begin, int64_t end) {
      MK_DISPATCH(input_gradient_samples(at, g.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(), begin, end,
                                         dx.data_ptr<scalar_t>()));
    });
  });
  return dx;
}

}  // namespace margin_kernels
