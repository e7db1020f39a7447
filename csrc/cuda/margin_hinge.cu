// Launcher of margin_hinge.cuh: inputs in one type, contiguous; copies only where they are not so already.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "../check.h"
#include "../ops.h"
#include "margin_hinge.cuh"
#include "on_device.h"

namespace margin_kernels {
namespace {

using cuda::in;
using cuda::out;
using math::Aggregation;

Tensor plain(const Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

// Keeps the converted tensors alive while a kernel is launched on their pointers.
struct Inputs {
  Tensor gap, norm, gamma, cap, weight, min_norm;
  double eps;
  Aggregation aggregation;
  bool mean_over_layers;

  Inputs(at::ScalarType type, const Tensor& gap_, const Tensor& norm_, const Tensor& gamma_,
         const std::optional<Tensor>& cap_, const std::optional<Tensor>& weight_,
         const std::optional<Tensor>& min_norm_, double eps_, std::string_view aggregation_,
         std::string_view layer_reduction)
      : gap(plain(gap_, type)),
        norm(plain(norm_, type)),
        gamma(plain(gamma_, type)),
        cap(cap_ ? plain(*cap_, type) : Tensor()),
        weight(weight_ ? plain(*weight_, type) : Tensor()),
        min_norm(min_norm_ ? plain(*min_norm_, type) : Tensor()),
        eps(eps_),
        aggregation(math::aggregation_of(aggregation_)),
        mean_over_layers(layer_reduction == "mean") {
    TORCH_CHECK_VALUE(
        norm.size(1) <= std::numeric_limits<int>::max() && norm.size(2) <= std::numeric_limits<int>::max(),
        "norm has too many competitors or layers: ", norm.sizes());
  }

  template <class T>
  cuda::MarginHinge<T> pointers() const {
    return {in<T>(gap),
            in<T>(norm),
            in<T>(gamma),
            cap.defined() ? in<T>(cap) : nullptr,
            weight.defined() ? in<T>(weight) : nullptr,
            min_norm.defined() ? in<T>(min_norm) : nullptr,
            norm.size(0),
            static_cast<int>(norm.size(1)),
            static_cast<int>(norm.size(2)),
            static_cast<T>(eps),
            aggregation,
            mean_over_layers};
  }
};

template <class Body>
void with_acc(at::ScalarType type, const Body& body) {
  type == at::kDouble ? body(cuda::Type<double>()) : body(cuda::Type<float>());
}

std::tuple<Tensor, Tensor> margin_hinge_cuda(const Tensor& gap, const Tensor& norm, const Tensor& gamma,
                                             const std::optional<Tensor>& cap, const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& min_norm, double eps,
                                             std::string_view aggregation, std::string_view layer_reduction) {
  check::margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  const cuda::OnDevice device(gap);
  const auto type = check::accumulate_type({gap, norm});
  const auto options = gap.options().dtype(type);
  Tensor loss = at::empty({gap.size(0)}, options), distance = at::empty(norm.sizes(), options);
  const Inputs inputs(type, gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  with_acc(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda::margin_hinge_forward(device.launch, inputs.pointers<T>(), out<T>(loss), out<T>(distance));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, distance};
}

std::tuple<Tensor, Tensor> margin_hinge_backward_cuda(const Tensor& grad, const Tensor& gap, const Tensor& norm,
                                                      const Tensor& gamma, const std::optional<Tensor>& cap,
                                                      const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& min_norm, double eps,
                                                      std::string_view aggregation, std::string_view layer_reduction,
                                                      bool norm_grad) {
  const cuda::OnDevice device(gap);
  const auto type = check::accumulate_type({gap, norm});
  Tensor dgap = at::empty(gap.sizes(), gap.options().dtype(type));
  Tensor dnorm = norm_grad ? at::empty(norm.sizes(), norm.options().dtype(type)) : at::empty({0}, norm.options());
  const Tensor grads = plain(grad, type);
  const Inputs inputs(type, gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  with_acc(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda::margin_hinge_backward(device.launch, inputs.pointers<T>(), in<T>(grads), out<T>(dgap),
                                norm_grad ? out<T>(dnorm) : nullptr);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dgap.to(gap.scalar_type()), norm_grad ? dnorm.to(norm.scalar_type()) : dnorm};
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CUDA, m) {
  m.impl("margin_hinge", margin_hinge_cuda);
  m.impl("margin_hinge_backward", margin_hinge_backward_cuda);
}

}  // namespace margin_kernels
