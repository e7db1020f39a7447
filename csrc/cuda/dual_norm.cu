// Launcher of dual_norm.cuh: one launch for all layers of one type, plus a small one where rows have several parts.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <limits>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "dual_norm.cuh"
#include "on_device.h"

namespace margin_kernels {
namespace {

using cuda::in;
using cuda::NormLayer;
using cuda::out;

constexpr at::ScalarType kTypes[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};

int64_t inner_rows(const Tensor& g, int64_t batch_dims) { return batch_dims == 2 ? g.size(1) : 1; }

NormLayer layer_of(const Tensor& g, int64_t batch_dims, int column) {
  NormLayer layer{};
  layer.data = g.const_data_ptr();
  layer.outer_stride = g.stride(0);
  layer.inner_stride = batch_dims == 2 ? g.stride(1) : 0;
  layer.length = row_length(g, batch_dims);
  layer.column = column;
  return layer;
}

// run(plan, Type<T>(), workspace) for the layers of each type: one round unless the layers differ in type.
template <class Run>
void for_each_type(const std::vector<Tensor>& tensors, const std::vector<NormLayer>& layers, int64_t batch_dims,
                   const Run& run) {
  const Tensor& first = tensors[0];
  const int64_t inner = inner_rows(first, batch_dims), rows = first.size(0) * inner;
  for (const auto type : kTypes) {
    std::vector<NormLayer> same;
    for (size_t l = 0; l < layers.size(); ++l) {
      if (tensors[l].scalar_type() == type) same.push_back(layers[l]);
    }
    if (same.empty()) continue;
    const cuda::NormPlan plan(same, rows, inner, static_cast<int>(layers.size()),
                              static_cast<int>(c10::elementSize(type)));
    TORCH_CHECK_VALUE(plan.fits(), "gradients have too many rows for one launch: ", rows);
    const Tensor workspace = at::empty({2 * plan.partials}, first.options().dtype(at::kDouble));
    cuda::with_type(type, [&](auto tag) { run(plan, tag, workspace); });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

Tensor dual_norm_cuda(TensorList gradients, double p, int64_t batch_dims) {
  check::dual_norm(gradients, p, batch_dims);
  if (math::needs_float64(p) && check::accumulate_type(gradients) == at::kFloat) {
    return dual_norm_cuda(in_float64(gradients), p, batch_dims).to(at::kFloat);
  }
  const cuda::OnDevice device(gradients[0]);
  const auto type = check::accumulate_type(gradients);
  auto sizes = gradients[0].sizes().slice(0, batch_dims).vec();
  sizes.push_back(static_cast<int64_t>(gradients.size()));
  Tensor norms = at::empty(sizes, gradients[0].options().dtype(type));
  std::vector<Tensor> tensors;
  std::vector<NormLayer> layers;
  for (const Tensor& gradient : gradients) {
    // A float64 result beside float32 layers: those layers are computed in double too.
    const Tensor wide = widened(gradient, type);
    tensors.push_back(dense_rows(wide, batch_dims) ? wide : wide.contiguous());
    layers.push_back(layer_of(tensors.back(), batch_dims, static_cast<int>(layers.size())));
  }
  for_each_type(tensors, layers, batch_dims, [&](const cuda::NormPlan& plan, auto tag, const Tensor& workspace) {
    using T = typename decltype(tag)::type;
    cuda::dual_norm_forward<T>(device.launch, plan, p, out<cuda::acc_t<T>>(norms), out<cuda::Partial>(workspace));
  });
  return norms;
}

std::vector<Tensor> dual_norm_backward_cuda(const Tensor& grad, TensorList gradients, const Tensor& norms, double p,
                                            int64_t batch_dims) {
  if (math::needs_float64(p) && norms.scalar_type() == at::kFloat) {
    const auto wide = in_float64(gradients);
    const Tensor exact = dual_norm_cuda(wide, p, batch_dims);
    // A norm beyond float32 stays infinite, and the derivative 0.
    const Tensor values = at::where(norms.isinf(), norms.to(at::kDouble), exact);
    return restored(dual_norm_backward_cuda(grad.to(at::kDouble), wide, values, p, batch_dims), gradients);
  }
  const cuda::OnDevice device(norms);
  const Tensor grads = grad.to(norms.scalar_type()).contiguous(), values = norms.contiguous();
  std::vector<Tensor> result, tensors, slopes;
  std::vector<NormLayer> layers;
  for (const Tensor& gradient : gradients) {
    result.push_back(at::empty_like(gradient));
    const Tensor wide = widened(gradient, norms.scalar_type());
    const bool native = dense_rows(wide, batch_dims) && wide.scalar_type() == gradient.scalar_type() &&
                        result.back().strides().slice(batch_dims) == wide.strides().slice(batch_dims);
    tensors.push_back(native ? wide : wide.contiguous());
    slopes.push_back(native ? result.back() : at::empty_like(tensors.back()));
    NormLayer layer = layer_of(tensors.back(), batch_dims, static_cast<int>(layers.size()));
    layer.slope = slopes.back().mutable_data_ptr();
    layer.slope_outer_stride = slopes.back().stride(0);
    layer.slope_inner_stride = batch_dims == 2 ? slopes.back().stride(1) : 0;
    layers.push_back(layer);
  }
  for_each_type(tensors, layers, batch_dims, [&](const cuda::NormPlan& plan, auto tag, const Tensor& workspace) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    cuda::dual_norm_backward<T>(device.launch, plan, p, in<acc>(values), in<acc>(grads), out<int64_t>(workspace));
  });
  for (size_t l = 0; l < result.size(); ++l) {
    if (!result[l].is_same(slopes[l])) result[l].copy_(slopes[l]);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CUDA, m) {
  m.impl("dual_norm", dual_norm_cuda);
  m.impl("dual_norm_backward", dual_norm_backward_cuda);
}

}  // namespace margin_kernels
