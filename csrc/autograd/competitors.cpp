// dz[n,:] = g_nll (softmax(z_n) - e_y) + sum_j g_gap_j (e_{I_j} - e_y)
#include <ATen/ops/cat.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>

#include "function.h"

namespace margin_kernels {
namespace {

struct CompetitorsFunction : Function<CompetitorsFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, int64_t k) {
    BelowAutograd guard;
    auto [gap, nll, index, normalizer] = competitors(logits, target, k);
    ctx->save_for_backward({logits, target, index, normalizer});
    ctx->mark_non_differentiable({index, normalizer});
    ctx->set_materialize_grads(false);
    return {gap, nll, index, normalizer};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor &grad_gap = grads[0], &grad_nll = grads[1];
    if (!grad_gap.defined() && !grad_nll.defined()) return {Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    return {competitors_backward(if_defined(grad_gap), if_defined(grad_nll), saved[0], saved[1], saved[2], saved[3]),
            Tensor(), Tensor()};
  }
};

// With v the gradient that arrives at dz:  d g_nll = <v, softmax - e_y>,  d g_gap_j = v[I_j] - v[y],
// dz' = g_nll softmax (v - <v, softmax>).  Plain ATen, so it can be differentiated again.
struct CompetitorsBackwardFunction : Function<CompetitorsBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const std::optional<Tensor>& grad_gap,
                        const std::optional<Tensor>& grad_nll, const Tensor& logits, const Tensor& target,
                        const Tensor& index, const Tensor& normalizer) {
    BelowAutograd guard;
    ctx->save_for_backward({grad_nll.value_or(Tensor()), logits, target, index});
    ctx->saved_data["has_gap"] = grad_gap.has_value();
    if (grad_gap) ctx->saved_data["gap_type"] = static_cast<int64_t>(grad_gap->scalar_type());
    return competitors_backward(grad_gap, grad_nll, logits, target, index, normalizer);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_nll = saved[0], &logits = saved[1], &target = saved[2], &index = saved[3];
    const auto acc = check::accumulate_type(logits.scalar_type());
    const Tensor v = grads[0].to(acc), y = target.unsqueeze(1);
    Tensor d_gap, d_nll, d_logits;
    if (ctx->saved_data["has_gap"].toBool()) {
      d_gap = (v.gather(1, index) - v.gather(1, y)).to(at::ScalarType(ctx->saved_data["gap_type"].toInt()));
    }
    if (grad_nll.defined()) {
      const Tensor softmax = at::softmax(logits.to(acc), 1);
      const Tensor mean = (v * softmax).sum(1, /*keepdim=*/true);
      d_nll = (mean - v.gather(1, y)).squeeze(1).to(grad_nll.scalar_type());
      d_logits = (grad_nll.to(acc).unsqueeze(1) * softmax * (v - mean)).to(logits.scalar_type());
    }
    return {d_gap, d_nll, d_logits, Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> competitors_autograd(const Tensor& logits, const Tensor& target, int64_t k) {
  if (!needs_graph({logits})) {
    BelowAutograd guard;
    return competitors(logits, target, k);
  }
  auto out = CompetitorsFunction::apply(logits, target, k);
  return {out[0], out[1], out[2], out[3]};
}

Tensor competitors_backward_autograd(const std::optional<Tensor>& grad_gap, const std::optional<Tensor>& grad_nll,
                                     const Tensor& logits, const Tensor& target, const Tensor& index,
                                     const Tensor& normalizer) {
  return CompetitorsBackwardFunction::apply(grad_gap, grad_nll, logits, target, index, normalizer);
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("competitors", competitors_autograd);
  m.impl("competitors_backward", competitors_backward_autograd);
}

}  // namespace margin_kernels
