// With g = w_i - w_y, u = d||g||/dg:  drows = sum over pairs of grad u (e_i - e_y)
#include <ATen/ops/index_select.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "../math/dual_norm.h"
#include "function.h"
#include "row_norm.h"

namespace margin_kernels {
namespace {

struct RowDistanceFunction : Function<RowDistanceFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& index, const Tensor& target, double p) {
    BelowAutograd guard;
    Tensor norm = row_distance(rows, index, target, p);
    ctx->save_for_backward({rows, index, target, norm});
    ctx->saved_data["p"] = p;
    return norm;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    return {row_distance_backward(grads[0], s[0], s[1], s[2], s[3], ctx->saved_data["p"].toDouble()), Tensor(),
            Tensor(), Tensor()};
  }
};

// The norm counts as a function of the rows, as in dual_norm. Plain ATen, so it can be differentiated again; the
// differences [N, k, D] exist here and nowhere else.
struct RowDistanceBackwardFunction : Function<RowDistanceBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& rows, const Tensor& index,
                        const Tensor& target, const Tensor& norm, double p) {
    BelowAutograd guard;
    ctx->save_for_backward({grad, rows, index, target, norm});
    ctx->saved_data["p"] = p;
    return row_distance_backward(grad, rows, index, target, norm, p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const Tensor &grad = s[0], &rows = s[1], &index = s[2], label = s[3].unsqueeze(1);
    const double p = ctx->saved_data["p"].toDouble(), q = math::dual_exponent(p);
    const auto type = s[4].scalar_type();
    const auto inside = [&](const Tensor& i) { return at::logical_and(i >= 0, i < rows.sym_size(0)); };
    const Tensor valid = at::logical_and(inside(index), inside(label)), none = at::zeros_like(index);
    const Tensor i = at::where(valid, index, none), y = at::where(valid, label, none);
    const Tensor norm = at::where(valid, s[4], at::zeros_like(s[4]));  // a zero norm has zero derivatives
    const auto difference = [&](const Tensor& t) {
      auto sizes = index.sym_sizes().vec();
      sizes.push_back(t.sym_size(1));
      const Tensor wide = t.to(type);
      return (wide.index_select(0, i.flatten()) - wide.index_select(0, y.flatten())).reshape_symint(sizes);
    };
    const Tensor g = difference(rows), v = difference(grads[0]), column = norm.unsqueeze(-1);
    const Tensor u = dual_norm_backward(at::ones_like(column), {g}, column, p, 2)[0];
    const Tensor u_dot_v = (u * v).sum(-1);
    Tensor d_rows;
    if (q != 1 && !std::isinf(q)) {  // there u is piecewise constant
      const Tensor h = (norm_curvature(g, norm, v, u_dot_v, q) * grad.to(type).unsqueeze(-1)).flatten(0, 1);
      const Tensor zeros = at::zeros_like(rows, rows.options().dtype(type));
      d_rows = (add_rows(zeros, i.flatten(), h) - add_rows(zeros, y.flatten(), h)).to(rows.scalar_type());
    }
    return {u_dot_v.to(grad.scalar_type()), d_rows, Tensor(), Tensor(), Tensor(), Tensor()};
  }

  // zeros [C, D] with values [P, D] added at index [P], in a fixed order: on the CPU index_add goes through the rows
  // one by one; on a GPU it adds atomically, while index_put sorts.
  static Tensor add_rows(const Tensor& zeros, const Tensor& index, const Tensor& values) {
    return zeros.is_cuda() ? zeros.index_put({index}, values, /*accumulate=*/true) : zeros.index_add(0, index, values);
  }
};

Tensor row_distance_autograd(const Tensor& rows, const Tensor& index, const Tensor& target, double p) {
  if (!needs_graph({rows})) {
    BelowAutograd guard;
    return row_distance(rows, index, target, p);
  }
  return RowDistanceFunction::apply(rows, index, target, p);
}

Tensor row_distance_backward_autograd(const Tensor& grad, const Tensor& rows, const Tensor& index, const Tensor& target,
                                      const Tensor& norm, double p) {
  return RowDistanceBackwardFunction::apply(grad, rows, index, target, norm, p);
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("row_distance", row_distance_autograd);
  m.impl("row_distance_backward", row_distance_backward_autograd);
}

}  // namespace margin_kernels
