// With c[n,j,l] the weight of an active term in the loss (0 where it is not active) and e = eps + norm:
//   dloss/dgap_j = sum_l c / e,    dloss/dnorm = -c gap / e^2
#include <ATen/ops/argmin.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "function.h"

namespace margin_kernels {
namespace {

struct MarginHingeFunction : Function<MarginHingeFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& gap, const Tensor& norm, const Tensor& gamma,
                               const std::optional<Tensor>& cap, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& min_norm, double eps, std::string_view aggregation,
                               std::string_view layer_reduction) {
    BelowAutograd guard;
    auto [loss, distance] = margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
    ctx->save_for_backward(
        {gap, norm, gamma, cap.value_or(Tensor()), weight.value_or(Tensor()), min_norm.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["aggregation"] = std::string(aggregation);
    ctx->saved_data["layer_reduction"] = std::string(layer_reduction);
    ctx->mark_non_differentiable({distance});
    return {loss, distance};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const bool norm_grad = ctx->needs_input_grad(1);
    auto [dgap, dnorm] =
        margin_hinge_backward(grads[0], s[0], s[1], s[2], if_defined(s[3]), if_defined(s[4]), if_defined(s[5]),
                              ctx->saved_data["eps"].toDouble(), ctx->saved_data["aggregation"].toStringRef(),
                              ctx->saved_data["layer_reduction"].toStringRef(), norm_grad);
    variable_list result(9);
    result[0] = dgap;
    if (norm_grad) result[1] = dnorm;
    return result;
  }
};

struct MarginHingeBackwardFunction : Function<MarginHingeBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& gap, const Tensor& norm,
                               const Tensor& gamma, const std::optional<Tensor>& cap,
                               const std::optional<Tensor>& weight, const std::optional<Tensor>& min_norm, double eps,
                               std::string_view aggregation, std::string_view layer_reduction, bool norm_grad) {
    BelowAutograd guard;
    ctx->save_for_backward(
        {grad, gap, norm, gamma, cap.value_or(Tensor()), weight.value_or(Tensor()), min_norm.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["aggregation"] = std::string(aggregation);
    ctx->saved_data["layer_reduction"] = std::string(layer_reduction);
    ctx->saved_data["norm_grad"] = norm_grad;
    ctx->set_materialize_grads(false);
    auto [dgap, dnorm] = margin_hinge_backward(grad, gap, norm, gamma, cap, weight, min_norm, eps, aggregation,
                                               layer_reduction, norm_grad);
    return {dgap, dnorm};
  }

  // Plain ATen, so it can be differentiated again. va, vb: what arrives at dgap [N,k] and dnorm [N,k,L].
  static variable_list backward(AutogradContext* ctx, const variable_list& v) {
    const auto s = ctx->get_saved_variables();
    const auto type = check::accumulate_type({s[1], s[2]});
    const Tensor grad = s[0].to(type).unsqueeze(-1).unsqueeze(-1);  // [N, 1, 1]
    const Tensor raw = s[1].to(type).unsqueeze(-1);                 // [N, k, 1]
    const Tensor norm = s[2].to(type), gamma = s[3].to(type);
    const double infinity = std::numeric_limits<double>::infinity();
    // A gap that is infinite, a norm that is, and a pair that is left out have no slope: no 0 * infinity is formed.
    const Tensor far = raw.abs().eq(infinity), gap = raw.masked_fill(far, 0);
    const Tensor endless = norm.eq(infinity), e = norm.masked_fill(endless, 1) + ctx->saved_data["eps"].toDouble();
    const Tensor cap = s[4].defined() ? s[4].to(type) : at::full_like(gamma, std::numeric_limits<double>::infinity());
    Tensor weight = s[5].defined() ? s[5].to(type) : at::ones_like(gamma);
    if (ctx->saved_data["layer_reduction"].toStringRef() == "mean") weight = weight / weight.sum();
    Tensor out = raw.eq(-infinity).expand_as(e);
    if (s[6].defined()) {  // a NaN gap stays
      out = at::logical_or(out, at::logical_and(norm <= s[6].to(type), raw.eq(raw)));
    }
    const Tensor distance = at::where(far, -raw, (-gap / e).masked_fill(endless, 0));
    const Tensor c = coefficients(distance, out, gamma, cap, weight, ctx->saved_data["aggregation"].toStringRef())
                         .masked_fill(at::logical_or(endless, far), 0);
    Tensor d_grad = at::zeros_like(e), d_gap, d_norm = at::zeros_like(e);
    if (v[0].defined()) {
      const Tensor va = v[0].to(type).unsqueeze(-1);
      d_grad = d_grad + va * c / e;
      d_norm = d_norm - va * grad * c / (e * e);
    }
    if (v[1].defined() && ctx->saved_data["norm_grad"].toBool()) {
      const Tensor vb = v[1].to(type);
      d_grad = d_grad - vb * c * gap / (e * e);
      d_gap = (-vb * grad * c / (e * e)).sum(-1).to(s[1].scalar_type());
      d_norm = d_norm + 2 * vb * grad * c * gap / (e * e * e);
    }
    variable_list result(11);
    result[0] = d_grad.sum({1, 2}).to(s[0].scalar_type());
    result[1] = d_gap;
    result[2] = d_norm.to(s[2].scalar_type());
    return result;
  }

  // c[n,j,l], piecewise constant: no gradient flows through it. 0 in the pairs that are left out.
  static Tensor coefficients(const Tensor& distance_, const Tensor& out, const Tensor& gamma, const Tensor& cap,
                             const Tensor& weight, std::string_view aggregation) {
    const Tensor distance = distance_.detach();
    const auto active = [&](const Tensor& d) {
      const Tensor shortfall = gamma - d;
      return at::logical_or(shortfall <= 0, shortfall >= cap).logical_not().to(d.scalar_type());
    };
    const double k = static_cast<double>(distance.size(1));
    Tensor c;
    if (aggregation == "max") {
      // The first of equals. Where all are left out the first is taken, and left out below.
      const Tensor seen = distance.masked_fill(out, std::numeric_limits<double>::infinity());
      const Tensor nearest = seen.argmin(1, /*keepdim=*/true);
      c = at::zeros_like(distance).scatter(1, nearest, active(distance.gather(1, nearest))) * weight;
    } else if (aggregation == "mean_distance") {
      const Tensor count = out.logical_not().sum(1, /*keepdim=*/true).clamp_min(1).to(distance.scalar_type());
      const Tensor mean = distance.masked_fill(out, 0).sum(1, /*keepdim=*/true) / count;
      c = (active(mean) * weight / count).expand_as(distance);
    } else {
      c = active(distance) * (aggregation == "sum" ? weight : weight / k);
    }
    return c.masked_fill(out, 0);
  }
};

std::tuple<Tensor, Tensor> margin_hinge_autograd(const Tensor& gap, const Tensor& norm, const Tensor& gamma,
                                                 const std::optional<Tensor>& cap, const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& min_norm, double eps,
                                                 std::string_view aggregation, std::string_view layer_reduction) {
  // A hyper-parameter that asks for a gradient would get none without a word.
  check::margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  if (!needs_graph({gap, norm})) {
    BelowAutograd guard;
    return margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  }
  auto out = MarginHingeFunction::apply(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> margin_hinge_backward_autograd(const Tensor& grad, const Tensor& gap, const Tensor& norm,
                                                          const Tensor& gamma, const std::optional<Tensor>& cap,
                                                          const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& min_norm, double eps,
                                                          std::string_view aggregation,
                                                          std::string_view layer_reduction, bool norm_grad) {
  auto out = MarginHingeBackwardFunction::apply(grad, gap, norm, gamma, cap, weight, min_norm, eps, aggregation,
                                                layer_reduction, norm_grad);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("margin_hinge", margin_hinge_autograd);
  m.impl("margin_hinge_backward", margin_hinge_backward_autograd);
}

}  // namespace margin_kernels
