// Output shapes and dtypes, for torch.compile, FakeTensor and the meta device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "check.h"
#include "ops.h"

namespace margin_kernels {
namespace {

at::TensorOptions accumulate_options(const Tensor& t) {
  return t.options().dtype(check::accumulate_type(t.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> competitors_meta(const Tensor& logits,
                                                                                    const Tensor& target, int64_t k,
                                                                                    int64_t, bool uniform) {
  check::competitors(logits, target, k);
  const auto n = logits.dim() == 3 ? logits.sym_size(0) * logits.sym_size(2) : logits.sym_size(0);
  const auto acc = accumulate_options(logits);
  const c10::SymInt measured = uniform ? n : c10::SymInt(0);
  return {at::empty_symint({n, k}, acc),
          at::empty_symint({n}, acc),
          at::empty_symint({n}, acc),
          at::empty_symint({measured}, acc),
          at::empty_symint({n, k}, logits.options().dtype(at::kLong)),
          at::empty_symint({n, 3}, acc),
          at::empty_symint({n}, logits.options().dtype(at::kBool))};
}

Tensor competitors_backward_meta(const std::optional<Tensor>&, const std::optional<Tensor>&,
                                 const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor& logits,
                                 const Tensor&, const Tensor&, const Tensor&) {
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

Tensor dual_norm_meta(TensorList gradients, double p, int64_t batch_dims) {
  check::dual_norm(gradients, p, batch_dims);
  auto sizes = gradients[0].sym_sizes().slice(0, batch_dims).vec();
  sizes.push_back(c10::SymInt(static_cast<int64_t>(gradients.size())));
  const auto type = check::accumulate_type(gradients);
  return at::empty_symint(sizes, gradients[0].options().dtype(type));
}

std::vector<Tensor> dual_norm_backward_meta(const Tensor&, TensorList gradients, const Tensor&, double, int64_t) {
  std::vector<Tensor> result;
  for (const Tensor& g : gradients) result.push_back(at::empty_like(g));
  return result;
}

std::tuple<Tensor, Tensor> margin_hinge_meta(const Tensor& gap, const Tensor& norm, const Tensor& gamma,
                                             const std::optional<Tensor>& cap, const std::optional<Tensor>& weight,
                                             const std::optional<Tensor>& min_norm, double eps,
                                             std::string_view aggregation, std::string_view layer_reduction) {
  check::margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  const auto acc = norm.options().dtype(check::accumulate_type({gap, norm}));
  return {at::empty_symint({gap.sym_size(0)}, acc), at::empty_symint(norm.sym_sizes(), acc)};
}

std::tuple<Tensor, Tensor> margin_hinge_backward_meta(const Tensor&, const Tensor& gap, const Tensor& norm,
                                                      const Tensor&, const std::optional<Tensor>&,
                                                      const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                      double, std::string_view, std::string_view, bool norm_grad) {
  return {at::empty_like(gap, at::MemoryFormat::Contiguous), norm_grad
                                                                 ? at::empty_like(norm, at::MemoryFormat::Contiguous)
                                                                 : at::empty_symint({c10::SymInt(0)}, norm.options())};
}

Tensor row_distance_meta(const Tensor& rows, const Tensor& index, const Tensor& target, double p) {
  check::row_distance(rows, index, target, p);
  return at::empty_symint(index.sym_sizes(), accumulate_options(rows));
}

Tensor row_distance_backward_meta(const Tensor&, const Tensor& rows, const Tensor&, const Tensor&, const Tensor&,
                                  double) {
  return at::empty_like(rows, at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor, Tensor> one_to_n_meta(const Tensor& logits, const Tensor& target, double delta,
                                                 std::string_view bound, bool cross_entropy) {
  check::one_to_n(logits, target, delta, bound);
  const auto acc = accumulate_options(logits);
  const auto n = logits.sym_size(0);
  return {at::empty_symint({n}, acc), at::empty_symint({logits.sym_size(1)}, acc),
          at::empty_symint({cross_entropy ? n : c10::SymInt(0)}, acc)};
}

Tensor one_to_n_backward_meta(const Tensor&, const Tensor& logits, const Tensor&, const Tensor&, const Tensor&, double,
                              std::string_view, bool) {
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deepfool_step_meta(const Tensor& gap, const Tensor& gradients,
                                                              const std::optional<Tensor>& active, double p) {
  check::deepfool_step(gap, gradients, active, p);
  const auto n = gap.sym_size(0);
  auto sizes = gradients.sym_sizes().vec();
  sizes.erase(sizes.begin() + 1);
  const auto acc = gap.options().dtype(check::accumulate_type({gap, gradients}));
  return {at::empty_symint(sizes, gradients.options()), at::empty_symint({n}, acc),
          at::empty_symint({n}, gap.options().dtype(at::kLong)), at::empty_symint({n}, acc)};
}

std::tuple<Tensor, Tensor> deepfool_step_backward_meta(const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                       const Tensor& gap, const Tensor& gradients, const Tensor&,
                                                       const Tensor&, const std::optional<Tensor>&, double) {
  return {at::empty_like(gap, at::MemoryFormat::Contiguous), at::empty_like(gradients, at::MemoryFormat::Contiguous)};
}

Tensor convolution_input_gradient_meta(const Tensor& gradient, const Tensor& weight, IntArrayRef padding,
                                       IntArrayRef dilation, SymIntArrayRef size) {
  check::convolution_input_gradient(gradient, weight, padding, dilation, size);
  return at::empty_symint({gradient.sym_size(0), weight.sym_size(1), size[0], size[1]}, gradient.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Meta, m) {
  m.impl("competitors", competitors_meta);
  m.impl("competitors_backward", competitors_backward_meta);
  m.impl("dual_norm", dual_norm_meta);
  m.impl("dual_norm_backward", dual_norm_backward_meta);
  m.impl("margin_hinge", margin_hinge_meta);
  m.impl("margin_hinge_backward", margin_hinge_backward_meta);
  m.impl("row_distance", row_distance_meta);
  m.impl("row_distance_backward", row_distance_backward_meta);
  m.impl("one_to_n", one_to_n_meta);
  m.impl("one_to_n_backward", one_to_n_backward_meta);
  m.impl("deepfool_step", deepfool_step_meta);
  m.impl("deepfool_step_backward", deepfool_step_backward_meta);
  m.impl("convolution_input_gradient", convolution_input_gradient_meta);
}

}  // namespace margin_kernels
