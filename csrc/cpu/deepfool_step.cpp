// One DeepFool step on the CPU: reads every gradient once and the chosen one again, while it lies in the cache; writes
// one step per sample. Backward writes the gradient of each candidate once: zeros but for the chosen one.
#include "../math/deepfool_step.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "dual_norm.h"
#include "fresh_pages.h"
#include "grain.h"

namespace margin_kernels {

template <class scalar_t>
struct DeepFoolForward {
  using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const acc* gap;             // [N, k]
  const scalar_t* gradients;  // [N, k, D], rows of unit stride
  int64_t strides[2], k, length;
  const bool* active;  // [N] or null
  scalar_t* step;      // [N, D]
  acc* distance;       // [N]
  int64_t* choice;     // [N]
  acc* norm;           // [N]
  const scalar_t* row(int64_t n, int64_t j) const { return gradients + n * strides[0] + j * strides[1]; }
};

template <class scalar_t>
struct DeepFoolBackward {
  using acc = typename DeepFoolForward<scalar_t>::acc;
  DeepFoolForward<scalar_t> in;
  const scalar_t* grad_step;  // [N, D] or null
  const acc* grad_distance;   // [N] or null
  acc* dgap;                  // [N, k]
  scalar_t* dgradients;       // [N, k, D] contiguous
};

}  // namespace margin_kernels

#define MK_KERNEL "deepfool_step_kernel.h"
#include "foreach_isa.h"

namespace margin_kernels {
namespace {

using math::Norm;

Tensor step_like(const Tensor& gradients) {
  auto sizes = gradients.sizes().vec();
  sizes.erase(sizes.begin() + 1);
  return at::empty(sizes, gradients.options());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deepfool_step_cpu(const Tensor& gap, const Tensor& gradients,
                                                             const std::optional<Tensor>& active, double p) {
  check::deepfool_step(gap, gradients, active, p);
  const int64_t n = gap.size(0);
  const auto type = check::accumulate_type({gap, gradients});
  const Tensor g = gap.to(type).contiguous(), w = contiguous_rows(widened(gradients, type), 2);
  const Tensor mask = active ? active->contiguous() : Tensor();
  Tensor step = step_like(w);
  Tensor distance = at::empty({n}, gap.options().dtype(type)), norm = at::empty_like(distance);
  Tensor choice = at::empty({n}, gap.options().dtype(at::kLong));
  const double q = math::dual_exponent(p);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, w.scalar_type(), "deepfool_step", [&] {
    using acc = typename DeepFoolForward<scalar_t>::acc;
    const DeepFoolForward<scalar_t> at{g.const_data_ptr<acc>(),    w.const_data_ptr<scalar_t>(),
                                       {w.stride(0), w.stride(1)}, w.size(1),
                                       row_length(w, 2),           active ? mask.const_data_ptr<bool>() : nullptr,
                                       step.data_ptr<scalar_t>(),  distance.data_ptr<acc>(),
                                       choice.data_ptr<int64_t>(), norm.data_ptr<acc>()};
    with_norm(p, [&](auto kind) {
      at::parallel_for(0, n, grain(at.k * at.length), [&](int64_t begin, int64_t end) {
        constexpr auto which = decltype(kind)::value;
        MK_DISPATCH(step_rows<which>(at, begin, end, q));
      });
    });
  });
  return {step.to(gradients.scalar_type()), distance, choice, norm};
}

// dgap and dgradients of sample n, both zero on entry. Sums in float64, in the order of the row.
template <Norm norm, class scalar_t>
void gradient_of(const DeepFoolBackward<scalar_t>& at, int64_t n, double q) {
  using acc = typename DeepFoolForward<scalar_t>::acc;
  const int64_t length = at.in.length, j = at.in.choice[n];
  const scalar_t* w = at.in.row(n, j);
  const scalar_t* v = at.grad_step ? at.grad_step + n * length : nullptr;
  scalar_t* dw = at.dgradients + (n * at.in.k + j) * length;
  const double size = at.in.norm[n], gap = at.in.gap[n * at.in.k + j];
  if (size == 0) return;
  if (std::isnan(size)) {
    at.dgap[n * at.in.k + j] = static_cast<acc>(size);
    std::fill_n(dw, length, static_cast<scalar_t>(static_cast<acc>(size)));
    return;
  }
  int64_t first = 0;
  if constexpr (norm == Norm::MAX) {
    while (first < length && std::fabs(static_cast<double>(w[first])) != size) ++first;
  }
  const auto u = [&](int64_t i) {
    const double x = static_cast<double>(w[i]);
    if constexpr (norm == Norm::MAX) return i == first ? math::sign(x) : 0.0;
    return math::slope<norm>(x, size, q);
  };
  double u_dot_v = 0;
  if (v) {
    for (int64_t i = 0; i < length; ++i) u_dot_v += u(i) * static_cast<double>(v[i]);
  }
  const double distance = std::fabs(gap) / size;
  const double t = u_dot_v + (at.grad_distance ? static_cast<double>(at.grad_distance[n]) : 0.0);
  at.dgap[n * at.in.k + j] = static_cast<acc>(math::gap_gradient(gap, size, t));
  for (int64_t i = 0; i < length; ++i) {
    const double x = static_cast<double>(w[i]), y = v ? static_cast<double>(v[i]) : 0.0;
    dw[i] =
        static_cast<scalar_t>(static_cast<acc>(math::row_gradient<norm>(x, u(i), y, size, q, distance, t, u_dot_v)));
  }
}

std::tuple<Tensor, Tensor> deepfool_step_backward_cpu(const std::optional<Tensor>& grad_step,
                                                      const std::optional<Tensor>& grad_distance, const Tensor& gap,
                                                      const Tensor& gradients, const Tensor& choice, const Tensor& norm,
                                                      const std::optional<Tensor>& active, double p) {
  const int64_t n = gap.size(0);
  const auto type = norm.scalar_type();
  const Tensor g = gap.to(type).contiguous(), w = contiguous_rows(widened(gradients, type), 2);
  const Tensor j = choice.contiguous(), sizes = norm.contiguous();
  const Tensor from_step = grad_step ? grad_step->to(w.scalar_type()).contiguous() : Tensor();
  const Tensor from_distance = grad_distance ? grad_distance->to(type).contiguous() : Tensor();
  const Tensor mask = active ? active->contiguous() : Tensor();
  Tensor dgap = at::empty(g.sizes(), g.options());
  Tensor dgradients = at::empty_like(w, at::MemoryFormat::Contiguous);
  advise_large_pages(dgradients);
  const double q = math::dual_exponent(p);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, w.scalar_type(), "deepfool_step_backward", [&] {
    using acc = typename DeepFoolForward<scalar_t>::acc;
    DeepFoolBackward<scalar_t> at{};
    at.in.gap = g.const_data_ptr<acc>();
    at.in.gradients = w.const_data_ptr<scalar_t>();
    at.in.strides[0] = w.stride(0);
    at.in.strides[1] = w.stride(1);
    at.in.k = w.size(1);
    at.in.length = row_length(w, 2);
    at.in.choice = const_cast<int64_t*>(j.const_data_ptr<int64_t>());
    at.in.norm = const_cast<acc*>(sizes.const_data_ptr<acc>());
    at.grad_step = grad_step ? from_step.const_data_ptr<scalar_t>() : nullptr;
    at.grad_distance = grad_distance ? from_distance.const_data_ptr<acc>() : nullptr;
    at.dgap = dgap.data_ptr<acc>();
    at.dgradients = dgradients.data_ptr<scalar_t>();
    const bool* on = active ? mask.const_data_ptr<bool>() : nullptr;
    with_norm(p, [&](auto kind) {
      at::parallel_for(0, n, grain(at.in.k * at.in.length), [&](int64_t begin, int64_t end) {
        const int64_t per_sample = at.in.k * at.in.length;
        std::fill(at.dgap + begin * at.in.k, at.dgap + end * at.in.k, acc(0));
        std::memset(static_cast<void*>(at.dgradients + begin * per_sample), 0,
                    (end - begin) * per_sample * sizeof(scalar_t));
        for (int64_t i = begin; i < end; ++i) {
          if (!on || on[i]) gradient_of<decltype(kind)::value>(at, i, q);
        }
      });
    });
  });
  return {dgap.to(gap.scalar_type()), dgradients.to(gradients.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) {
  m.impl("deepfool_step", deepfool_step_cpu);
  m.impl("deepfool_step_backward", deepfool_step_backward_cpu);
}

}  // namespace margin_kernels
