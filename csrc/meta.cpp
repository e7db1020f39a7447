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

std::tuple<Tensor, Tensor, Tensor, Tensor> competitors_meta(const Tensor& logits, const Tensor& target, int64_t k) {
  check::competitors(logits, target, k);
  const auto n = logits.sym_size(0);
  const auto acc = accumulate_options(logits);
  return {at::empty_symint({n, k}, acc), at::empty_symint({n}, acc),
          at::empty_symint({n, k}, logits.options().dtype(at::kLong)), at::empty_symint({n, 2}, acc)};
}

Tensor competitors_backward_meta(const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor& logits,
                                 const Tensor&, const Tensor&, const Tensor&) {
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

Tensor dual_norm_meta(TensorList gradients, double p, int64_t batch_dims) {
  check::dual_norm(gradients, p, batch_dims);
  auto sizes = gradients[0].sym_sizes().slice(0, batch_dims).vec();
  sizes.push_back(c10::SymInt(static_cast<int64_t>(gradients.size())));
  auto type = at::kFloat;
  for (const Tensor& g : gradients) {
    if (g.scalar_type() == at::kDouble) type = at::kDouble;
  }
  return at::empty_symint(sizes, gradients[0].options().dtype(type));
}

std::vector<Tensor> dual_norm_backward_meta(const Tensor&, TensorList gradients, const Tensor&, double, int64_t) {
  std::vector<Tensor> result;
  for (const Tensor& g : gradients) result.push_back(at::empty_like(g));
  return result;
}

std::tuple<Tensor, Tensor> margin_hinge_meta(const Tensor& gap, const Tensor& norm, const Tensor& gamma,
                                             const std::optional<Tensor>& cap, const std::optional<Tensor>& weight,
                                             double eps, std::string_view aggregation,
                                             std::string_view layer_reduction) {
  check::margin_hinge(gap, norm, gamma, cap, weight, eps, aggregation, layer_reduction);
  const auto acc = gap.scalar_type() == at::kDouble ? accumulate_options(gap) : accumulate_options(norm);
  return {at::empty_symint({gap.sym_size(0)}, acc), at::empty_symint(norm.sym_sizes(), acc)};
}

std::tuple<Tensor, Tensor> margin_hinge_backward_meta(const Tensor&, const Tensor& gap, const Tensor& norm,
                                                      const Tensor&, const std::optional<Tensor>&,
                                                      const std::optional<Tensor>&, double, std::string_view,
                                                      std::string_view, bool norm_grad) {
  return {at::empty_like(gap, at::MemoryFormat::Contiguous), norm_grad
                                                                 ? at::empty_like(norm, at::MemoryFormat::Contiguous)
                                                                 : at::empty_symint({c10::SymInt(0)}, norm.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Meta, m) {
  m.impl("competitors", competitors_meta);
  m.impl("competitors_backward", competitors_backward_meta);
  m.impl("dual_norm", dual_norm_meta);
  m.impl("dual_norm_backward", dual_norm_backward_meta);
  m.impl("margin_hinge", margin_hinge_meta);
  m.impl("margin_hinge_backward", margin_hinge_backward_meta);
}

}  // namespace margin_kernels
