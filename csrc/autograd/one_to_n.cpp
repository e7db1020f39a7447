// P[j,c] = softmax over the negatives of column c, R[i,k] = softmax of row i, s = sigmoid(A_y - positive):
//   dz[j,c] = S_c P 1[z > -delta],  S_c = sum of g_i s_i over y_i = c;    dz[i,y_i] = -g_i s_i 1[z < delta]
//   with cross-entropy  dz[i,y_i] = -g_i 1[z < delta]  and  g_i (1 - s_i) R[i,k] everywhere
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "function.h"

namespace margin_kernels {
namespace {

struct OneToNFunction : Function<OneToNFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& target, double delta,
                               std::string_view bound, bool cross_entropy) {
    BelowAutograd guard;
    auto [loss, column, normalizer] = one_to_n(logits, target, delta, bound, cross_entropy);
    ctx->save_for_backward({logits, target, column, normalizer});
    ctx->saved_data["delta"] = delta;
    ctx->saved_data["bound"] = std::string(bound);
    ctx->saved_data["cross_entropy"] = cross_entropy;
    ctx->mark_non_differentiable({column, normalizer});
    return {loss, column, normalizer};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    variable_list result(5);
    result[0] = one_to_n_backward(grads[0], s[0], s[1], s[2], s[3], ctx->saved_data["delta"].toDouble(),
                                  ctx->saved_data["bound"].toStringRef(), ctx->saved_data["cross_entropy"].toBool());
    return result;
  }
};

// Plain ATen from the logits, so it can be differentiated again. Along v, which arrives at dz, with ' for derivatives:
//   A'_c = sum_j P v 1[z > -delta],   a' = v[i,y_i] 1[z < delta],   l' = sum_k R v
//   d g = s (A'_y - a')                                    with cross-entropy  (1 - s) l' + s A'_y - a'
//   e   = g s (1 - s) (A'_y - a')                          with cross-entropy  g s (1 - s) (A'_y - l')
//   d z = P 1[z > -delta] (sum of e over y_i = c  + S_c (v - A'_c))  and  -e 1[z < delta] at the label
//         with cross-entropy no label term, but  R (g (1 - s) (v - l') - e)  everywhere
struct OneToNBackwardFunction : Function<OneToNBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& logits, const Tensor& target,
                        const Tensor& column, const Tensor& normalizer, double delta, std::string_view bound,
                        bool cross_entropy) {
    BelowAutograd guard;
    ctx->save_for_backward({grad, logits, target});
    ctx->saved_data["delta"] = delta;
    ctx->saved_data["bound"] = std::string(bound);
    ctx->saved_data["cross_entropy"] = cross_entropy;
    return one_to_n_backward(grad, logits, target, column, normalizer, delta, bound, cross_entropy);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const double delta = ctx->saved_data["delta"].toDouble();
    const bool cross_entropy = ctx->saved_data["cross_entropy"].toBool();
    const auto type = check::accumulate_type(saved[1].scalar_type());
    const Tensor g = saved[0].to(type), v = grads[0].to(type);
    Tensor z = saved[1].to(type);
    const Tensor zeros = at::zeros_like(z);
    const auto fill = [&](double value) { return at::full_like(z, value); };

    const Tensor own = saved[2].unsqueeze(1) == at::arange(z.sym_size(1), saved[2].options());
    const double infinity = std::numeric_limits<double>::infinity();
    const Tensor usable = at::logical_and(z < infinity, own.any(1, /*keepdim=*/true));  // -inf is a masked class
    z = at::where(usable, z, fill(std::numeric_limits<double>::quiet_NaN()));
    const auto of_label = [&](const Tensor& t) { return at::where(own, t, zeros).sum(1); };  // [N, C] or [C] -> [N]
    const auto of_class = [&](const Tensor& t) {                                             // [N] -> [C]
      return at::where(own, t.unsqueeze(1), zeros).sum(0);
    };

    const Tensor b = at::where(z <= -delta, fill(-delta), z);
    const Tensor has_negatives = own.logical_not().any(0), some = of_label(has_negatives.to(type)) > 0;
    const Tensor masked = at::where(own, fill(-std::numeric_limits<double>::infinity()), b);
    // The logsumexp without the delta of "positive", which cancels in P; 0 stands for a class without negatives.
    const Tensor column = at::where(has_negatives, masked, zeros).logsumexp(0);
    const Tensor open = at::logical_and(own.logical_not(), (z <= -delta).logical_not());
    const Tensor slope = at::where(open, (b - column).exp(), zeros);  // P 1[z > -delta]
    const double lift = ctx->saved_data["bound"].toStringRef() == "positive" ? delta : 0.0;
    const Tensor against = of_label(column) + lift, z_label = of_label(z);
    const Tensor label_open = at::logical_and(own, (z >= delta).logical_not());

    const Tensor d_column = (slope * v).sum(0), d_against = of_label(d_column);
    const Tensor d_label = at::where(label_open, v, zeros).sum(1);
    // A row whose classes are all masked has no softmax.
    const Tensor empty = z.eq(-infinity).all(1), rows = z.masked_fill(empty.unsqueeze(1), 0);
    const Tensor positive = cross_entropy ? rows.logsumexp(1).masked_fill(empty, -infinity)
                                          : at::where(z_label >= delta, fill(delta).select(1, 0), z_label);
    const Tensor s = at::where(some, at::sigmoid(against - positive), zeros.select(1, 0));
    Tensor d_grad, d_positive, softmax;
    if (cross_entropy) {
      softmax = at::softmax(rows, 1).masked_fill(empty.unsqueeze(1), 0);
      d_positive = (softmax * v).sum(1);
      d_grad = (1 - s) * d_positive + s * d_against - d_label;
    } else {
      d_positive = d_label;
      d_grad = s * (d_against - d_label);
    }
    const Tensor e = g * s * (1 - s) * (d_against - d_positive);
    Tensor d_z = slope * (of_class(e) + of_class(g * s) * (v - d_column));
    if (cross_entropy) {
      d_z = d_z + softmax * ((g * (1 - s)).unsqueeze(1) * (v - d_positive.unsqueeze(1)) - e.unsqueeze(1));
    } else {
      d_z = d_z - at::where(label_open, e.unsqueeze(1), zeros);
    }
    variable_list result(8);
    result[0] = d_grad.to(saved[0].scalar_type());
    result[1] = d_z.to(saved[1].scalar_type());
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> one_to_n_autograd(const Tensor& logits, const Tensor& target, double delta,
                                                     std::string_view bound, bool cross_entropy) {
  if (!needs_graph({logits})) {
    BelowAutograd guard;
    return one_to_n(logits, target, delta, bound, cross_entropy);
  }
  auto out = OneToNFunction::apply(logits, target, delta, bound, cross_entropy);
  return {out[0], out[1], out[2]};
}

Tensor one_to_n_backward_autograd(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& column,
                                  const Tensor& normalizer, double delta, std::string_view bound, bool cross_entropy) {
  return OneToNBackwardFunction::apply(grad, logits, target, column, normalizer, delta, bound, cross_entropy);
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("one_to_n", one_to_n_autograd);
  m.impl("one_to_n_backward", one_to_n_backward_autograd);
}

}  // namespace margin_kernels
