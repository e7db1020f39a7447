// All schemas on one screen, and the dispatcher calls behind ops.h.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(margin_kernels, m) {
  m.def(
      "competitors(Tensor logits, Tensor target, int k) -> (Tensor gap, Tensor nll, Tensor index, Tensor normalizer)");
  m.def(
      "competitors_backward(Tensor? grad_gap, Tensor? grad_nll, Tensor logits, Tensor target, Tensor index, "
      "Tensor normalizer) -> Tensor");
  m.def("dual_norm(Tensor[] gradients, float p, int batch_dims) -> Tensor");
  m.def("dual_norm_backward(Tensor grad, Tensor[] gradients, Tensor norms, float p, int batch_dims) -> Tensor[]");
  m.def(
      "margin_hinge(Tensor gap, Tensor norm, Tensor gamma, Tensor? cap, Tensor? weight, float eps, str aggregation, "
      "str layer_reduction) -> (Tensor loss, Tensor distance)");
  m.def(
      "margin_hinge_backward(Tensor grad, Tensor gap, Tensor norm, Tensor gamma, Tensor? cap, "
      "Tensor? weight, float eps, str aggregation, str layer_reduction, bool norm_grad) -> (Tensor, Tensor)");
}

namespace margin_kernels {
namespace {

template <class Function>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> competitors(const Tensor& logits, const Tensor& target, int64_t k) {
  static auto op = find<decltype(competitors)>("margin_kernels::competitors");
  return op.call(logits, target, k);
}

Tensor competitors_backward(const std::optional<Tensor>& grad_gap, const std::optional<Tensor>& grad_nll,
                            const Tensor& logits, const Tensor& target, const Tensor& index, const Tensor& normalizer) {
  static auto op = find<decltype(competitors_backward)>("margin_kernels::competitors_backward");
  return op.call(grad_gap, grad_nll, logits, target, index, normalizer);
}

Tensor dual_norm(TensorList gradients, double p, int64_t batch_dims) {
  static auto op = find<decltype(dual_norm)>("margin_kernels::dual_norm");
  return op.call(gradients, p, batch_dims);
}

std::vector<Tensor> dual_norm_backward(const Tensor& grad, TensorList gradients, const Tensor& norms, double p,
                                       int64_t batch_dims) {
  static auto op = find<decltype(dual_norm_backward)>("margin_kernels::dual_norm_backward");
  return op.call(grad, gradients, norms, p, batch_dims);
}

std::tuple<Tensor, Tensor> margin_hinge(const Tensor& gap, const Tensor& norm, const Tensor& gamma,
                                        const std::optional<Tensor>& cap, const std::optional<Tensor>& weight,
                                        double eps, std::string_view aggregation, std::string_view layer_reduction) {
  static auto op = find<decltype(margin_hinge)>("margin_kernels::margin_hinge");
  return op.call(gap, norm, gamma, cap, weight, eps, aggregation, layer_reduction);
}

std::tuple<Tensor, Tensor> margin_hinge_backward(const Tensor& grad, const Tensor& gap, const Tensor& norm,
                                                 const Tensor& gamma, const std::optional<Tensor>& cap,
                                                 const std::optional<Tensor>& weight, double eps,
                                                 std::string_view aggregation, std::string_view layer_reduction,
                                                 bool norm_grad) {
  static auto op = find<decltype(margin_hinge_backward)>("margin_kernels::margin_hinge_backward");
  return op.call(grad, gap, norm, gamma, cap, weight, eps, aggregation, layer_reduction, norm_grad);
}

}  // namespace margin_kernels
