// With p = softmax(z), q the softmax over the competitors alone, e = e_y, M finite classes (math/competitors.h):
//   dz = g_nll (p - e) + g_phi (e - q) + g_uniform (p - 1 / M) + sum_j g_gap_j (e_{I_j} - e)
#include <ATen/ops/amax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "function.h"

namespace margin_kernels {
namespace {

struct CompetitorsFunction : Function<CompetitorsFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, int64_t k,
                               int64_t ignore_index, bool uniform) {
    BelowAutograd guard;
    auto [gap, nll, phi, uniform_loss, index, normalizer, valid] =
        competitors(logits, target, k, ignore_index, uniform);
    ctx->save_for_backward({logits, target, index, normalizer});
    if (uniform) {
      ctx->mark_non_differentiable({index, normalizer, valid});
    } else {
      ctx->mark_non_differentiable({index, normalizer, valid, uniform_loss});
    }
    ctx->set_materialize_grads(false);
    return {gap, nll, phi, uniform_loss, index, normalizer, valid};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor &gap = grads[0], &nll = grads[1], &phi = grads[2], &uniform = grads[3];
    Tensor dlogits;
    if (gap.defined() || nll.defined() || phi.defined() || uniform.defined()) {
      const auto saved = ctx->get_saved_variables();
      dlogits = competitors_backward(if_defined(gap), if_defined(nll), if_defined(phi), if_defined(uniform), saved[0],
                                     saved[1], saved[2], saved[3]);
    }
    return {dlogits, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// With v the gradient that arrives at dz, rest = 1 - p_y and t = <v, q> - v_y:
//   d g_nll = rest t     d g_phi = -t     d g_uniform = rest t + v_y - mean of v over the finite classes
//   d g_gap_j = v[I_j] - v[y]
//   dz' = (g_nll + g_uniform) (1 - rest) rest t (q - e) + ((g_nll + g_uniform) rest - g_phi) q (v - <v, q>)
// Plain ATen, so it can be differentiated again. Every value is selected before it is used where a class is masked.
struct CompetitorsBackwardFunction : Function<CompetitorsBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const std::optional<Tensor>& grad_gap,
                        const std::optional<Tensor>& grad_nll, const std::optional<Tensor>& grad_phi,
                        const std::optional<Tensor>& grad_uniform, const Tensor& logits, const Tensor& target,
                        const Tensor& index, const Tensor& normalizer) {
    BelowAutograd guard;
    ctx->save_for_backward({grad_nll.value_or(Tensor()), grad_phi.value_or(Tensor()), grad_uniform.value_or(Tensor()),
                            logits, target, index, normalizer});
    ctx->saved_data["has_gap"] = grad_gap.has_value();
    if (grad_gap) ctx->saved_data["gap_type"] = static_cast<int64_t>(grad_gap->scalar_type());
    return competitors_backward(grad_gap, grad_nll, grad_phi, grad_uniform, logits, target, index, normalizer);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor& logits = saved[3];
    if (!grads[0].defined()) return variable_list(8);
    if (logits.dim() == 3) return of_positions(ctx, grads[0], saved);
    return differentiated(ctx, grads[0], saved);
  }

  // The same of logits [N, C, S], by way of their rows.
  static variable_list of_positions(AutogradContext* ctx, const Tensor& grad, variable_list saved) {
    const auto n = saved[3].sym_size(0), classes = saved[3].sym_size(1), s = saved[3].sym_size(2);
    const auto rows = [&](const Tensor& t) { return t.transpose(1, 2).reshape_symint({n * s, classes}); };
    saved[3] = rows(saved[3]);
    variable_list found = differentiated(ctx, rows(grad), saved);
    if (found[4].defined()) found[4] = found[4].reshape_symint({n, s, classes}).transpose(1, 2);
    return found;
  }

  static variable_list differentiated(AutogradContext* ctx, const Tensor& grad, const variable_list& saved) {
    const Tensor &grad_nll = saved[0], &grad_phi = saved[1], &grad_uniform = saved[2];
    const Tensor &logits = saved[3], &target = saved[4], &index = saved[5], &normalizer = saved[6];
    const auto acc = check::accumulate_type(logits.scalar_type());
    const Tensor sum = normalizer.narrow(1, 1, 1);
    const Tensor silent = sum.eq(0), poisoned = sum.isnan();
    // An ignored row, or one without competitors, has no gradient; a row that holds NaN has NaN.
    const Tensor v = grad.to(acc).masked_fill(silent, 0).masked_fill(poisoned, kNaN);
    const Tensor y = target.unsqueeze(1).clamp(0, logits.sym_size(1) - 1);
    const Tensor z = logits.to(acc).masked_fill(silent.logical_or(poisoned), 0);
    const Tensor finite = z.ne(-kInfinity), v_label = v.gather(1, y), label_is_finite = finite.gather(1, y);
    Tensor d_gap, d_nll, d_phi, d_uniform, d_logits;
    if (ctx->saved_data["has_gap"].toBool()) {
      const Tensor used = finite.gather(1, index).logical_and(label_is_finite);
      d_gap = (v.gather(1, index) - v_label)
                  .masked_fill(used.logical_not(), 0)
                  .to(at::ScalarType(ctx->saved_data["gap_type"].toInt()));
    }
    if (grad_nll.defined() || grad_phi.defined() || grad_uniform.defined()) {
      const Tensor others = z.scatter(1, y, -kInfinity), q = at::softmax(others, 1);
      const Tensor max = at::amax(others, 1, /*keepdim=*/true).detach();
      const Tensor phi = z.gather(1, y) - max - at::logsumexp(others - max, 1, /*keepdim=*/true);
      const Tensor rest = at::sigmoid(-phi), v_others = (v * q).sum(1, /*keepdim=*/true), t = v_others - v_label;
      const Tensor label = at::zeros_like(z).scatter(1, y, 1);
      const auto column = [&](const Tensor& g) { return g.to(acc).unsqueeze(1); };
      const auto like = [](const Tensor& value, const Tensor& g) { return value.squeeze(1).to(g.scalar_type()); };
      Tensor both, weight;  // g_nll + g_uniform, and the factor of q in dz
      if (grad_nll.defined()) {
        both = column(grad_nll);
        d_nll = like(rest * t, grad_nll);
      }
      if (grad_uniform.defined()) {
        both = both.defined() ? both + column(grad_uniform) : column(grad_uniform);
        const Tensor count = finite.sum(1, /*keepdim=*/true).to(acc);
        const Tensor mean = v.masked_fill(finite.logical_not(), 0).sum(1, /*keepdim=*/true) / count;
        d_uniform = like(rest * t + v_label - mean, grad_uniform);
      }
      if (both.defined()) {
        weight = both * rest;
        d_logits = both * at::sigmoid(phi) * rest * t * (q - label);
      }
      if (grad_phi.defined()) {
        const Tensor from_phi = column(grad_phi).masked_fill(label_is_finite.logical_not(), 0);
        d_phi = like(-t.masked_fill(label_is_finite.logical_not(), 0), grad_phi);
        weight = weight.defined() ? weight - from_phi : -from_phi;
      }
      const Tensor of_others = weight * q * (v - v_others);
      d_logits = (d_logits.defined() ? d_logits + of_others : of_others).to(logits.scalar_type());
    }
    return {d_gap, d_nll, d_phi, d_uniform, d_logits, Tensor(), Tensor(), Tensor()};
  }

  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> competitors_autograd(const Tensor& logits,
                                                                                        const Tensor& target, int64_t k,
                                                                                        int64_t ignore_index,
                                                                                        bool uniform) {
  if (!needs_graph({logits})) {
    BelowAutograd guard;
    return competitors(logits, target, k, ignore_index, uniform);
  }
  auto out = CompetitorsFunction::apply(logits, target, k, ignore_index, uniform);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

Tensor competitors_backward_autograd(const std::optional<Tensor>& grad_gap, const std::optional<Tensor>& grad_nll,
                                     const std::optional<Tensor>& grad_phi, const std::optional<Tensor>& grad_uniform,
                                     const Tensor& logits, const Tensor& target, const Tensor& index,
                                     const Tensor& normalizer) {
  return CompetitorsBackwardFunction::apply(grad_gap, grad_nll, grad_phi, grad_uniform, logits, target, index,
                                            normalizer);
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("competitors", competitors_autograd);
  m.impl("competitors_backward", competitors_backward_autograd);
}

}  // namespace margin_kernels
