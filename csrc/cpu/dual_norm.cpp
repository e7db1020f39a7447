// Dual norms of gradient rows on the CPU: reads every gradient once, writes one number per row.
#include "dual_norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "grain.h"

#define MK_KERNEL "dual_norm_kernel.h"
#include "foreach_isa.h"

namespace margin_kernels {
namespace {

template <class scalar_t>
Rows<scalar_t> rows_of(const Tensor& g, int64_t batch_dims) {
  using value_t = std::remove_const_t<scalar_t>;
  scalar_t* data;
  if constexpr (std::is_const_v<scalar_t>) {
    data = g.const_data_ptr<value_t>();
  } else {
    data = g.data_ptr<value_t>();
  }
  const bool pairs = batch_dims == 2;
  return {data, pairs ? std::max<int64_t>(g.size(1), 1) : 1, g.stride(0), pairs ? g.stride(1) : 0,
          row_length(g, batch_dims)};
}

int64_t count_rows(const Tensor& g, int64_t batch_dims) { return batch_dims == 2 ? g.size(0) * g.size(1) : g.size(0); }

Tensor dual_norm_cpu(TensorList gradients, double p, int64_t batch_dims) {
  check::dual_norm(gradients, p, batch_dims);
  const auto layers = static_cast<int64_t>(gradients.size());
  const auto type = check::accumulate_type(gradients);
  auto sizes = gradients[0].sizes().slice(0, batch_dims).vec();
  sizes.push_back(layers);
  Tensor norms = at::empty(sizes, gradients[0].options().dtype(type));
  const double q = math::dual_exponent(p);
  for (int64_t l = 0; l < layers; ++l) {
    // A float64 result beside float32 layers: those layers are computed in double too.
    const Tensor wide = widened(gradients[l], type);
    const Tensor g = dense_rows(wide, batch_dims) ? wide : wide.contiguous();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, g.scalar_type(), "dual_norm", [&] {
      using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
      const auto rows = rows_of<const scalar_t>(g, batch_dims);
      acc* out = norms.data_ptr<acc>() + l;
      with_norm(p, [&](auto norm) {
        constexpr auto kind = decltype(norm)::value;
        at::parallel_for(0, count_rows(g, batch_dims), grain(rows.length), [&](int64_t begin, int64_t end) {
          MK_DISPATCH(norm_rows<kind, scalar_t>(rows, begin, end, q, out, layers));
        });
      });
    });
  }
  return norms;
}

std::vector<Tensor> dual_norm_backward_cpu(const Tensor& grad, TensorList gradients, const Tensor& norms, double p,
                                           int64_t batch_dims) {
  if (math::needs_float64(p) && norms.scalar_type() == at::kFloat) {
    const auto wide = in_float64(gradients);
    const Tensor exact = dual_norm_cpu(wide, p, batch_dims);
    // A norm beyond float32 stays infinite, and the derivative 0.
    const Tensor values = at::where(norms.isinf(), norms.to(at::kDouble), exact);
    return restored(dual_norm_backward_cpu(grad.to(at::kDouble), wide, values, p, batch_dims), gradients);
  }
  const auto layers = static_cast<int64_t>(gradients.size());
  const Tensor grads = grad.to(norms.scalar_type()).contiguous(), values = norms.contiguous();
  const double q = math::dual_exponent(p);
  std::vector<Tensor> result;
  for (int64_t l = 0; l < layers; ++l) {
    Tensor out = at::empty_like(gradients[l]);
    const Tensor wide = widened(gradients[l], norms.scalar_type());
    const bool native = dense_rows(wide, batch_dims) && wide.scalar_type() == out.scalar_type() &&
                        out.strides().slice(batch_dims) == wide.strides().slice(batch_dims);
    const Tensor g = native ? wide : wide.contiguous();
    Tensor slopes = native ? out : at::empty_like(g);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, g.scalar_type(), "dual_norm_backward", [&] {
      using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
      const auto rows = rows_of<const scalar_t>(g, batch_dims);
      const auto to = rows_of<scalar_t>(slopes, batch_dims);
      const acc* norm_data = values.const_data_ptr<acc>() + l;
      const acc* grad_data = grads.const_data_ptr<acc>() + l;
      with_norm(p, [&](auto norm) {
        constexpr auto kind = decltype(norm)::value;
        at::parallel_for(0, count_rows(g, batch_dims), grain(rows.length), [&](int64_t begin, int64_t end) {
          MK_DISPATCH(slope_rows<kind, scalar_t>(rows, to, begin, end, q, norm_data, grad_data, layers));
        });
      });
    });
    if (!native) out.copy_(slopes);
    result.push_back(out);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) {
  m.impl("dual_norm", dual_norm_cpu);
  m.impl("dual_norm_backward", dual_norm_backward_cpu);
}

}  // namespace margin_kernels
