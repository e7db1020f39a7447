// All schemas on one screen, and the dispatcher calls behind ops.h.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(margin_kernels, m) {
  m.def(
      "competitors(Tensor logits, Tensor target, int k, int ignore_index=-100, bool uniform=False) -> "
      "(Tensor gap, Tensor nll, Tensor phi, Tensor uniform, Tensor index, Tensor normalizer, Tensor valid)");
  m.def(
      "competitors_backward(Tensor? grad_gap, Tensor? grad_nll, Tensor? grad_phi, Tensor? grad_uniform, Tensor logits, "
      "Tensor target, Tensor index, Tensor normalizer) -> Tensor");
  m.def("dual_norm(Tensor[] gradients, float p, int batch_dims) -> Tensor");
  m.def("dual_norm_backward(Tensor grad, Tensor[] gradients, Tensor norms, float p, int batch_dims) -> Tensor[]");
  m.def(
      "margin_hinge(Tensor gap, Tensor norm, Tensor gamma, Tensor? cap, Tensor? weight, Tensor? min_norm, "
      "float eps, str aggregation, str layer_reduction) -> (Tensor loss, Tensor distance)");
  m.def(
      "margin_hinge_backward(Tensor grad, Tensor gap, Tensor norm, Tensor gamma, Tensor? cap, "
      "Tensor? weight, Tensor? min_norm, float eps, str aggregation, str layer_reduction, bool norm_grad) -> (Tensor, "
      "Tensor)");
  m.def("row_distance(Tensor rows, Tensor index, Tensor target, float p) -> Tensor");
  m.def("row_distance_backward(Tensor grad, Tensor rows, Tensor index, Tensor target, Tensor norm, float p) -> Tensor");
  m.def(
      "one_to_n(Tensor logits, Tensor target, float delta, str bound, bool cross_entropy) -> "
      "(Tensor loss, Tensor column, Tensor normalizer)");
  m.def(
      "one_to_n_backward(Tensor grad, Tensor logits, Tensor target, Tensor column, Tensor normalizer, float delta, "
      "str bound, bool cross_entropy) -> Tensor");
  m.def(
      "deepfool_step(Tensor gap, Tensor gradients, Tensor? active, float p) -> "
      "(Tensor step, Tensor distance, Tensor choice, Tensor norm)");
  m.def(
      "deepfool_step_backward(Tensor? grad_step, Tensor? grad_distance, Tensor gap, Tensor gradients, Tensor choice, "
      "Tensor norm, Tensor? active, float p) -> (Tensor, Tensor)");
  m.def(
      "convolution_input_gradient(Tensor gradient, Tensor weight, int[2] padding, int[2] dilation, SymInt[2] size) -> "
      "Tensor");
}

namespace margin_kernels {
namespace {

template <class Function>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> competitors(const Tensor& logits,
                                                                               const Tensor& target, int64_t k,
                                                                               int64_t ignore_index, bool uniform) {
  static auto op = find<decltype(competitors)>("margin_kernels::competitors");
  return op.call(logits, target, k, ignore_index, uniform);
}

Tensor competitors_backward(const std::optional<Tensor>& grad_gap, const std::optional<Tensor>& grad_nll,
                            const std::optional<Tensor>& grad_phi, const std::optional<Tensor>& grad_uniform,
                            const Tensor& logits, const Tensor& target, const Tensor& index, const Tensor& normalizer) {
  static auto op = find<decltype(competitors_backward)>("margin_kernels::competitors_backward");
  return op.call(grad_gap, grad_nll, grad_phi, grad_uniform, logits, target, index, normalizer);
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
                                        const std::optional<Tensor>& min_norm, double eps, std::string_view aggregation,
                                        std::string_view layer_reduction) {
  static auto op = find<decltype(margin_hinge)>("margin_kernels::margin_hinge");
  return op.call(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
}

std::tuple<Tensor, Tensor> margin_hinge_backward(const Tensor& grad, const Tensor& gap, const Tensor& norm,
                                                 const Tensor& gamma, const std::optional<Tensor>& cap,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& min_norm, double eps,
                                                 std::string_view aggregation, std::string_view layer_reduction,
                                                 bool norm_grad) {
  static auto op = find<decltype(margin_hinge_backward)>("margin_kernels::margin_hinge_backward");
  return op.call(grad, gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction, norm_grad);
}

Tensor row_distance(const Tensor& rows, const Tensor& index, const Tensor& target, double p) {
  static auto op = find<decltype(row_distance)>("margin_kernels::row_distance");
  return op.call(rows, index, target, p);
}

Tensor row_distance_backward(const Tensor& grad, const Tensor& rows, const Tensor& index, const Tensor& target,
                             const Tensor& norm, double p) {
  static auto op = find<decltype(row_distance_backward)>("margin_kernels::row_distance_backward");
  return op.call(grad, rows, index, target, norm, p);
}

std::tuple<Tensor, Tensor, Tensor> one_to_n(const Tensor& logits, const Tensor& target, double delta,
                                            std::string_view bound, bool cross_entropy) {
  static auto op = find<decltype(one_to_n)>("margin_kernels::one_to_n");
  return op.call(logits, target, delta, bound, cross_entropy);
}

Tensor one_to_n_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& column,
                         const Tensor& normalizer, double delta, std::string_view bound, bool cross_entropy) {
  static auto op = find<decltype(one_to_n_backward)>("margin_kernels::one_to_n_backward");
  return op.call(grad, logits, target, column, normalizer, delta, bound, cross_entropy);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deepfool_step(const Tensor& gap, const Tensor& gradients,
                                                         const std::optional<Tensor>& active, double p) {
  static auto op = find<decltype(deepfool_step)>("margin_kernels::deepfool_step");
  return op.call(gap, gradients, active, p);
}

std::tuple<Tensor, Tensor> deepfool_step_backward(const std::optional<Tensor>& grad_step,
                                                  const std::optional<Tensor>& grad_distance, const Tensor& gap,
                                                  const Tensor& gradients, const Tensor& choice, const Tensor& norm,
                                                  const std::optional<Tensor>& active, double p) {
  static auto op = find<decltype(deepfool_step_backward)>("margin_kernels::deepfool_step_backward");
  return op.call(grad_step, grad_distance, gap, gradients, choice, norm, active, p);
}

Tensor convolution_input_gradient(const Tensor& gradient, const Tensor& weight, IntArrayRef padding,
                                  IntArrayRef dilation, SymIntArrayRef size) {
  static auto op = find<decltype(convolution_input_gradient)>("margin_kernels::convolution_input_gradient");
  return op.call(gradient, weight, padding, dilation, size);
}

}  // namespace margin_kernels
