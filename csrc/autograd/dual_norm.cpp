// D = ||G||_q,  u = dD/dG = sign(G) (|G| / D)^(q-1),  du/dG v = (q-1)/D [ (|G|/D)^(q-2) v - u <u, v> ]
#include "../math/dual_norm.h"

#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include "function.h"
#include "row_norm.h"

namespace margin_kernels {
namespace {

struct DualNormFunction : Function<DualNormFunction> {
  static Tensor forward(AutogradContext* ctx, TensorList gradients, double p, int64_t batch_dims) {
    BelowAutograd guard;
    Tensor norms = dual_norm(gradients, p, batch_dims);
    variable_list saved(gradients.begin(), gradients.end());
    saved.push_back(norms);
    ctx->save_for_backward(saved);
    ctx->saved_data["p"] = p;
    ctx->saved_data["batch_dims"] = batch_dims;
    return norms;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto saved = ctx->get_saved_variables();
    const Tensor norms = saved.back();
    saved.pop_back();
    variable_list result = dual_norm_backward(grads[0], saved, norms, ctx->saved_data["p"].toDouble(),
                                              ctx->saved_data["batch_dims"].toInt());
    result.resize(saved.size() + 2);  // p and batch_dims
    return result;
  }
};

// The norms come in as an argument but count as a function of the gradients here: their own gradient is left out, and
// what arrives at the gradients is the whole derivative. Plain ATen, so it can be differentiated again.
struct DualNormBackwardFunction : Function<DualNormBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, TensorList gradients, const Tensor& norms,
                               double p, int64_t batch_dims) {
    BelowAutograd guard;
    variable_list saved(gradients.begin(), gradients.end());
    saved.push_back(grad);
    saved.push_back(norms);
    ctx->save_for_backward(saved);
    ctx->saved_data["p"] = p;
    ctx->saved_data["batch_dims"] = batch_dims;
    ctx->set_materialize_grads(false);
    return dual_norm_backward(grad, gradients, norms, p, batch_dims);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& v) {
    auto saved = ctx->get_saved_variables();
    const Tensor norms = saved.back(), grad = saved[saved.size() - 2];
    saved.resize(saved.size() - 2);
    const double p = ctx->saved_data["p"].toDouble(), q = math::dual_exponent(p);
    const auto batch_dims = ctx->saved_data["batch_dims"].toInt();
    const auto layers = static_cast<int64_t>(saved.size());

    variable_list d_gradients(layers);
    variable_list d_grads;
    for (int64_t l = 0; l < layers; ++l) {
      if (!v[l].defined()) {
        d_grads.push_back(at::zeros_like(grad.select(-1, l)));
        continue;
      }
      const Tensor d_norm = directional(v[l], saved[l], norms, l, p, batch_dims);  // <u, v>, [N, k] or [N]
      d_grads.push_back(d_norm.to(grad.scalar_type()));
      if (q != 1 && !std::isinf(q)) {  // there u is piecewise constant
        d_gradients[l] = curvature(v[l], saved[l], norms.select(-1, l), grad.select(-1, l), d_norm, q, batch_dims);
      }
    }
    variable_list result{at::stack(d_grads, -1)};
    result.insert(result.end(), d_gradients.begin(), d_gradients.end());
    result.resize(layers + 4);  // norms, p and batch_dims
    return result;
  }

  static Tensor rows(const Tensor& t, int64_t batch_dims, at::ScalarType type) {
    auto sizes = t.sym_sizes().slice(0, batch_dims).vec();
    c10::SymInt length = 1;
    for (int64_t d = batch_dims; d < t.dim(); ++d) length = length * t.sym_size(d);
    sizes.push_back(length);
    return t.to(type).reshape_symint(sizes);
  }

  // <u, v> over each row, through the op's own derivative u
  static Tensor directional(const Tensor& v, const Tensor& g, const Tensor& norms, int64_t layer, double p,
                            int64_t batch_dims) {
    const Tensor norm = norms.select(-1, layer).unsqueeze(-1);
    const auto type = norms.scalar_type();
    const Tensor wide = g.to(type);
    const Tensor u = dual_norm_backward(at::ones_like(norm), {wide}, norm, p, batch_dims)[0];
    return (rows(u, batch_dims, type) * rows(v, batch_dims, type)).sum(-1);
  }

  // grad H v
  static Tensor curvature(const Tensor& v, const Tensor& g, const Tensor& norm, const Tensor& grad,
                          const Tensor& u_dot_v, double q, int64_t batch_dims) {
    const auto type = norm.scalar_type();
    const Tensor h = norm_curvature(rows(g, batch_dims, type), norm, rows(v, batch_dims, type), u_dot_v, q);
    return (h * grad.to(type).unsqueeze(-1)).reshape_symint(g.sym_sizes()).to(g.scalar_type());
  }
};

Tensor dual_norm_autograd(TensorList gradients, double p, int64_t batch_dims) {
  if (!needs_graph(gradients)) {
    BelowAutograd guard;
    return dual_norm(gradients, p, batch_dims);
  }
  return DualNormFunction::apply(gradients, p, batch_dims);
}

std::vector<Tensor> dual_norm_backward_autograd(const Tensor& grad, TensorList gradients, const Tensor& norms, double p,
                                                int64_t batch_dims) {
  return DualNormBackwardFunction::apply(grad, gradients, norms, p, batch_dims);
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("dual_norm", dual_norm_autograd);
  m.impl("dual_norm_backward", dual_norm_backward_autograd);
}

}  // namespace margin_kernels
