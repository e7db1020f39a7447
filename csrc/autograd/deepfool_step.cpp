// With w, g the chosen gradient and gap, n = ||w||_q, d = |g| / n, u = dn/dw, H = d2n/dw2, v_s = grad_step:
//   t = grad_distance + <u, v_s>,    dgap = sign(g) t / n,    dw = -(d / n) t u + d H v_s
#include <ATen/ops/gather.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "../math/dual_norm.h"
#include "function.h"

namespace margin_kernels {
namespace {

struct DeepFoolStepFunction : Function<DeepFoolStepFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& gap, const Tensor& gradients,
                               const std::optional<Tensor>& active, double p) {
    BelowAutograd guard;
    auto [step, distance, choice, norm] = deepfool_step(gap, gradients, active, p);
    ctx->save_for_backward({gap, gradients, choice, norm, active.value_or(Tensor())});
    ctx->saved_data["p"] = p;
    ctx->mark_non_differentiable({choice, norm});
    ctx->set_materialize_grads(false);
    return {step, distance, choice, norm};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(4);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto s = ctx->get_saved_variables();
    std::tie(result[0], result[1]) =
        deepfool_step_backward(if_defined(grads[0]), if_defined(grads[1]), s[0], s[1], s[2], s[3], if_defined(s[4]),
                               ctx->saved_data["p"].toDouble());
    return result;
  }
};

// The chosen row's n, u and H, from the row itself: what is computed from them can be differentiated again. A sample
// whose norm is 0 (one that is not active too) has derivatives 0; one whose saved norm is NaN has derivatives NaN.
class ChosenRow {
 public:
  ChosenRow(const Tensor& gap_, const Tensor& gradients, const Tensor& choice, const Tensor& norm, const Tensor& active,
            double p)
      : q_(math::dual_exponent(p)), choice_(choice.unsqueeze(1)) {
    const auto type = norm.scalar_type();
    auto sizes = gradients.sym_sizes().slice(0, 2).vec();
    c10::SymInt length = 1;
    for (int64_t d = 2; d < gradients.dim(); ++d) length = length * gradients.sym_size(d);
    sizes.push_back(length);
    gap = chosen(gap_.to(type).unsqueeze(-1));
    w_ = chosen(gradients.to(type).reshape_symint(sizes));
    // Saved norm 0: flat, not active, or of a masked class, whose gap is infinite.
    const Tensor still = (norm == 0).unsqueeze(1);
    w_ = at::where(still, at::zeros_like(w_), w_);
    gap = at::where(still, at::zeros_like(gap), gap);
    if (active.defined()) w_ = at::where(active.unsqueeze(1), w_, at::zeros_like(w_));
    const Tensor factor = at::where(norm.isnan(), norm, at::ones_like(norm)).unsqueeze(1);
    gap = gap * factor;
    w_ = w_ * factor;
    if (std::isinf(q_)) {
      const Tensor first = w_.detach().abs().argmax(1, /*keepdim=*/true), largest = w_.gather(1, first);
      n = largest.abs();
      u = at::zeros_like(w_).scatter(1, first, largest.detach().sign());
    } else {
      n = dual_norm({w_}, p, 1);
    }
    flat = n == 0;
    n = at::where(flat, at::ones_like(n), n);
    if (std::isinf(q_)) return;
    ratio_ = w_ / n;
    zero_ = ratio_ == 0;
    magnitude_ = at::where(zero_, at::ones_like(ratio_), ratio_.abs());
    u = q_ == 2 ? ratio_ : at::where(zero_, at::zeros_like(ratio_), ratio_.sign() * magnitude_.pow(q_ - 1));
  }

  bool curved() const { return q_ != 1 && !std::isinf(q_); }

  // H v
  Tensor curvature(const Tensor& v) const {
    const Tensor along = power(q_ - 2) * v;
    return (along - u * dot(u, v)) * (q_ - 1) / n;
  }

  // d <b, H v> / dw = -(q-1)/n^2 K u + (q-1)/n (dk - <u,v> H b - <b,u> H v),   K = k - <b,u> <u,v>,
  // k = sum r^(q-2) b v,  dk = (q-2)/n (sign r^(q-3) b v - k u)
  Tensor third(const Tensor& b, const Tensor& v) const {
    const Tensor bu = dot(b, u), uv = dot(u, v), k = dot(power(q_ - 2) * b, v);
    Tensor inner = -uv * curvature(b) - bu * curvature(v);
    if (q_ != 2) inner = inner + (q_ - 2) / n * (ratio_.sign() * power(q_ - 3) * b * v - k * u);
    return (q_ - 1) / n * (inner - (k - bu * uv) / n * u);
  }

  static Tensor dot(const Tensor& a, const Tensor& b) { return (a * b).sum(1, /*keepdim=*/true); }

  // [N, k, D] -> [N, D] at the choice
  Tensor chosen(const Tensor& t) const {
    const Tensor place = choice_.unsqueeze(-1).expand_symint({t.sym_size(0), c10::SymInt(1), t.sym_size(2)});
    return t.gather(1, place).squeeze(1);
  }
  // [N, D] -> [N, k, D], 0 elsewhere
  Tensor spread(const Tensor& t, const c10::SymInt& k) const {
    const Tensor value = t.unsqueeze(1);
    const Tensor zeros = at::zeros_like(value).expand_symint({t.sym_size(0), k, t.sym_size(1)});
    return zeros.scatter(1, choice_.unsqueeze(-1).expand_symint(value.sym_sizes()), value);
  }

  Tensor gap, n, u, flat;  // [N, 1], [N, 1], [N, D], [N, 1]

 private:
  // (|w| / n)^exponent, 0 at zero entries, which are constants (but 1 for exponent 0)
  Tensor power(double exponent) const {
    if (exponent == 0) return at::ones_like(ratio_);
    return at::where(zero_, at::zeros_like(ratio_), magnitude_.pow(exponent));
  }

  double q_;
  Tensor choice_, w_, ratio_, zero_, magnitude_;
};

// With a = dgap', b = dw' what arrives at the two results, phi = a sign(g) t / n - d t <u,b> / n + d <b, H v_s>:
//   d phi / dt = a sign(g) / n - d <u,b> / n =: T,   d v_distance = T,   d v_s = T u + d H b
//   d g = sign(g) (-t <u,b> / n + <b, H v_s>) / n
//   d w = T H v_s + (d phi / dn) u - (d t / n) H b + d (d <b, H v_s> / dw)
struct DeepFoolStepBackwardFunction : Function<DeepFoolStepBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const std::optional<Tensor>& grad_step,
                               const std::optional<Tensor>& grad_distance, const Tensor& gap, const Tensor& gradients,
                               const Tensor& choice, const Tensor& norm, const std::optional<Tensor>& active,
                               double p) {
    BelowAutograd guard;
    ctx->save_for_backward({grad_step.value_or(Tensor()), grad_distance.value_or(Tensor()), gap, gradients, choice,
                            norm, active.value_or(Tensor())});
    ctx->saved_data["p"] = p;
    auto [dgap, dgradients] = deepfool_step_backward(grad_step, grad_distance, gap, gradients, choice, norm, active, p);
    return {dgap, dgradients};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const Tensor &grad_step = s[0], &grad_distance = s[1], &gap = s[2], &gradients = s[3];
    const ChosenRow row(gap, gradients, s[4], s[5], s[6], ctx->saved_data["p"].toDouble());
    const auto type = s[5].scalar_type();
    const auto rows = [&](const Tensor& t, int64_t lead) {  // the dimensions behind `lead` flattened
      auto sizes = t.sym_sizes().slice(0, lead).vec();
      sizes.push_back(row.u.sym_size(1));
      return t.to(type).reshape_symint(sizes);
    };
    const Tensor a = row.chosen(grads[0].to(type).unsqueeze(-1)), b = row.chosen(rows(grads[1], 2));
    const Tensor v = grad_step.defined() ? rows(grad_step, 1) : at::zeros_like(row.u);
    const Tensor sign = row.gap.sign(), size = row.gap.abs(), d = size / row.n, ub = ChosenRow::dot(row.u, b);
    Tensor t = ChosenRow::dot(row.u, v);
    if (grad_distance.defined()) t = t + grad_distance.to(type).unsqueeze(1);
    const bool curved = row.curved();
    const Tensor hv = curved ? row.curvature(v) : at::zeros_like(v), hb = curved ? row.curvature(b) : at::zeros_like(b);
    const Tensor bhv = ChosenRow::dot(b, hv);
    const auto live = [&](const Tensor& x) { return at::where(row.flat, at::zeros_like(x), x); };

    const Tensor slope = live((a * sign - d * ub) / row.n);  // T
    const Tensor by_norm = (-a * sign * t + 2 * d * t * ub) / (row.n * row.n) - d * bhv / row.n;
    Tensor d_w = slope * hv + by_norm * row.u - d * t / row.n * hb;
    if (curved) d_w = d_w + d * row.third(b, v);
    variable_list result(8);
    if (grad_step.defined()) {
      result[0] = live(slope * row.u + d * hb).reshape_symint(grad_step.sym_sizes()).to(grad_step.scalar_type());
    }
    if (grad_distance.defined()) result[1] = slope.squeeze(1).to(grad_distance.scalar_type());
    const auto k = gap.sym_size(1);
    result[2] = row.spread(live(sign * (bhv - t * ub / row.n) / row.n), k).squeeze(-1).to(gap.scalar_type());
    result[3] = row.spread(live(d_w), k).reshape_symint(gradients.sym_sizes()).to(gradients.scalar_type());
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> deepfool_step_autograd(const Tensor& gap, const Tensor& gradients,
                                                                  const std::optional<Tensor>& active, double p) {
  if (!needs_graph({gap, gradients})) {
    BelowAutograd guard;
    return deepfool_step(gap, gradients, active, p);
  }
  auto out = DeepFoolStepFunction::apply(gap, gradients, active, p);
  return {out[0], out[1], out[2], out[3]};
}

std::tuple<Tensor, Tensor> deepfool_step_backward_autograd(const std::optional<Tensor>& grad_step,
                                                           const std::optional<Tensor>& grad_distance,
                                                           const Tensor& gap, const Tensor& gradients,
                                                           const Tensor& choice, const Tensor& norm,
                                                           const std::optional<Tensor>& active, double p) {
  auto out = DeepFoolStepBackwardFunction::apply(grad_step, grad_distance, gap, gradients, choice, norm, active, p);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("deepfool_step", deepfool_step_autograd);
  m.impl("deepfool_step_backward", deepfool_step_backward_autograd);
}

}  // namespace margin_kernels
