// Launcher of deepfool_step.cuh: the norms of all candidates, then choice and step in one launch.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "deepfool_step.cuh"
#include "on_device.h"

namespace margin_kernels {
namespace {

using cuda::in;
using cuda::out;

// The inputs in the types of the kernel, kept alive while it is launched on their pointers.
struct Inputs {
  at::ScalarType type;
  Tensor gap, gradients, active;
  int64_t length;

  Inputs(const Tensor& gap_, const Tensor& gradients_, const std::optional<Tensor>& active_, at::ScalarType type_)
      : type(type_),
        gap(gap_.to(type).contiguous()),
        gradients(contiguous_rows(widened(gradients_, type), 2)),
        active(active_ ? active_->contiguous() : Tensor()),
        length(row_length(gradients, 2)) {
    TORCH_CHECK_VALUE(gap.numel() * cuda::step_parts(length) <= std::numeric_limits<int>::max(),
                      "gradients are too large for one launch: ", gradients.sizes());
  }

  template <class T>
  cuda::DeepFool<T> pointers(const cuda::acc_t<T>* norms) const {
    return {in<cuda::acc_t<T>>(gap),
            in<T>(gradients),
            gradients.stride(0),
            gradients.stride(1),
            active.defined() ? in<bool>(active) : nullptr,
            norms,
            gradients.size(0),
            gradients.size(1),
            length};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> deepfool_step_cuda(const Tensor& gap, const Tensor& gradients,
                                                              const std::optional<Tensor>& active, double p) {
  check::deepfool_step(gap, gradients, active, p);
  const cuda::OnDevice device(gap);
  const Inputs inputs(gap, gradients, active, check::accumulate_type({gap, gradients}));
  const int64_t n = gap.size(0);
  auto sizes = gradients.sizes().vec();
  sizes.erase(sizes.begin() + 1);
  Tensor step = at::empty(sizes, inputs.gradients.options());
  Tensor distance = at::empty({n}, inputs.gap.options()), norm = at::empty_like(distance);
  Tensor choice = at::empty({n}, gap.options().dtype(at::kLong));
  const Tensor norms = dual_norm({inputs.gradients}, p, /*batch_dims=*/2);
  const Tensor firsts = at::empty({p == 1 ? n * cuda::step_parts(inputs.length) : 0}, choice.options());
  cuda::with_type(inputs.gradients.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    cuda::deepfool_step_forward<T>(device.launch, inputs.pointers<T>(in<acc>(norms)), p, out<T>(step),
                                   out<acc>(distance), out<int64_t>(choice), out<acc>(norm), out<int64_t>(firsts));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {step.to(gradients.scalar_type()), distance, choice, norm};
}

std::tuple<Tensor, Tensor> deepfool_step_backward_cuda(const std::optional<Tensor>& grad_step,
                                                       const std::optional<Tensor>& grad_distance, const Tensor& gap,
                                                       const Tensor& gradients, const Tensor& choice,
                                                       const Tensor& norm, const std::optional<Tensor>& active,
                                                       double p) {
  const cuda::OnDevice device(gap);
  const auto type = norm.scalar_type();
  const Inputs inputs(gap, gradients, active, type);
  const Tensor j = choice.contiguous(), values = norm.contiguous();
  const Tensor from_step = grad_step ? grad_step->to(inputs.gradients.scalar_type()).contiguous() : Tensor();
  const Tensor from_distance = grad_distance ? grad_distance->to(type).contiguous() : Tensor();
  Tensor dgap = at::empty_like(inputs.gap);
  Tensor dgradients = at::empty_like(inputs.gradients, at::MemoryFormat::Contiguous);
  const Tensor products = at::empty({gap.size(0) * cuda::step_parts(inputs.length)}, gap.options().dtype(at::kDouble));
  const Tensor firsts = at::empty({p == 1 ? products.numel() : 0}, choice.options());
  cuda::with_type(inputs.gradients.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    cuda::deepfool_step_backward<T>(device.launch, inputs.pointers<T>(nullptr), p, in<int64_t>(j), in<acc>(values),
                                    grad_step ? in<T>(from_step) : nullptr,
                                    grad_distance ? in<acc>(from_distance) : nullptr, out<double>(products),
                                    out<int64_t>(firsts), out<acc>(dgap), out<T>(dgradients));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dgap.to(gap.scalar_type()), dgradients.to(gradients.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CUDA, m) {
  m.impl("deepfool_step", deepfool_step_cuda);
  m.impl("deepfool_step_backward", deepfool_step_backward_cuda);
}

}  // namespace margin_kernels
