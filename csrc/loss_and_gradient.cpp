#include "loss_and_gradient.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "margin_flags.h"
#include "ops.h"

// What lies between the kernels are loops over N numbers: as operations of PyTorch each would be a way through the
// dispatcher, which costs more than the arithmetic. soft_cotangent.h has the same direction as operations, for any
// device.
namespace margin_kernels {
namespace {

// [size, ...] of the type of `like`, from the number of each entry.
template <class T, class Value>
Tensor made(at::IntArrayRef shape, const Tensor& like, Value&& value) {
  Tensor result = at::empty(shape, like.options());
  T* data = result.data_ptr<T>();
  for (int64_t i = 0, size = result.numel(); i < size; ++i) data[i] = static_cast<T>(value(i));
  return result;
}

template <class T>
Tensor of_layers(const std::vector<double>& values, const Tensor& like) {
  return made<T>({static_cast<int64_t>(values.size())}, like, [&](int64_t l) { return values[l]; });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ranked_once(const Tensor& logits, const Tensor& target,
                                                                       int64_t k, int64_t ignore_index, bool soft) {
  const at::AutoDispatchBelowADInplaceOrView constant;
  TORCH_CHECK_VALUE(logits.is_cpu(), "logits must be on the CPU, got ", logits.device());
  auto [gap, nll, phi, uniform, index, normalizer, valid] =
      competitors(logits, target, k, ignore_index, /*uniform=*/false);
  if (!soft) return {gap, nll, index, normalizer, valid, uniform};
  Tensor soft_gap, direction;
  AT_DISPATCH_FLOATING_TYPES(phi.scalar_type(), "ranked_once", [&] {
    const scalar_t* own = phi.const_data_ptr<scalar_t>();
    const bool* counts = valid.const_data_ptr<bool>();
    soft_gap = made<scalar_t>({phi.size(0), 1}, phi, [&](int64_t n) { return -own[n]; });
    // As in soft_cotangent.h: a masked label has no phi.
    const auto label_is_masked = [&](int64_t n) {
      return counts[n] && own[n] == -std::numeric_limits<scalar_t>::infinity();
    };
    direction = competitors_backward(std::nullopt, made<scalar_t>(phi.sizes(), phi, label_is_masked),
                                     made<scalar_t>(phi.sizes(), phi, [&](int64_t n) { return counts[n] ? -1 : 0; }),
                                     std::nullopt, logits, target, index, normalizer);
  });
  return {soft_gap, nll, index, normalizer, valid, direction};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_and_gradient(
    const Tensor& logits, const Tensor& target, const Tensor& gap, const Tensor& nll, const Tensor& index,
    const Tensor& normalizer, const Tensor& valid, const Tensor& norm, const HingeNumbers& numbers,
    std::string_view aggregation, std::string_view layer_reduction, bool mean, bool soft) {
  const at::AutoDispatchBelowADInplaceOrView constant;
  TORCH_CHECK_VALUE(logits.is_cpu() && logits.dim() == 2, "logits must have shape [N, C] on the CPU, got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(logits.scalar_type() == norm.scalar_type(), "logits must be float32 or float64, as norm is, got ",
                    logits.scalar_type(), " and ", norm.scalar_type());
  const int64_t rows = logits.size(0), classes = logits.size(1), k = gap.size(1);
  TORCH_CHECK_VALUE(!soft || k == 1, "gap must have shape [N, 1] with soft, got ", gap.sizes());
  Tensor loss, gradient, weight, distance, active, degenerate;
  AT_DISPATCH_FLOATING_TYPES(norm.scalar_type(), "loss_and_gradient", [&] {
    const Tensor gamma = of_layers<scalar_t>(numbers.gamma, norm), cap = of_layers<scalar_t>(numbers.cap, norm);
    const Tensor weights = of_layers<scalar_t>(numbers.weight, norm);
    const Tensor min_norm = of_layers<scalar_t>(numbers.min_norm, norm);
    Tensor hinge;
    std::tie(hinge, distance) =
        margin_hinge(gap, norm, gamma, cap, weights, min_norm, numbers.eps, aggregation, layer_reduction);
    std::tie(active, degenerate) = margin_flags(gap, norm, distance, gamma, cap, min_norm, valid);

    const scalar_t *hinges = hinge.const_data_ptr<scalar_t>(), *nlls = nll.const_data_ptr<scalar_t>();
    const bool* counts = valid.const_data_ptr<bool>();
    const auto of_hinge = static_cast<scalar_t>(numbers.margin_weight);
    const auto of_nll = static_cast<scalar_t>(numbers.cross_entropy_weight);
    // As the losses have it: the hinge of an ignored row counts for nothing, whatever is in it, and its nll is 0.
    double sum = 0;
    int64_t counted = 0;
    for (int64_t n = 0; n < rows; ++n) {
      scalar_t term = counts[n] ? hinges[n] * of_hinge : scalar_t(0);
      if (of_nll != 0) term += nlls[n] * of_nll;
      sum += term;
      counted += counts[n];
    }
    const double share = mean ? 1.0 / static_cast<double>(counted) : 1.0;  // of a row in the loss
    loss = made<scalar_t>({}, norm, [&](int64_t) { return mean ? sum / static_cast<double>(counted) : sum; });

    const Tensor slope =
        made<scalar_t>({rows}, norm, [&](int64_t n) { return counts[n] ? share * of_hinge : scalar_t(0); });
    const Tensor of_gap =
        std::get<0>(margin_hinge_backward(slope, gap, norm, gamma, cap, weights, min_norm, numbers.eps, aggregation,
                                          layer_reduction, /*norm_grad=*/false));
    std::optional<Tensor> grad_nll, grad_phi;
    if (of_nll != 0) grad_nll = made<scalar_t>({rows}, norm, [&](int64_t) { return share * of_nll; });
    const scalar_t* of_gaps = of_gap.const_data_ptr<scalar_t>();
    if (soft) grad_phi = made<scalar_t>({rows}, norm, [&](int64_t n) { return -of_gaps[n]; });
    gradient = competitors_backward(soft ? std::nullopt : std::optional(of_gap), grad_nll, grad_phi, std::nullopt,
                                    logits, target, index, normalizer);

    const scalar_t* found = gradient.const_data_ptr<scalar_t>();
    const int64_t *labels = target.const_data_ptr<int64_t>(), *others = index.const_data_ptr<int64_t>();
    const int64_t row = gradient.stride(0), column = gradient.stride(1), step = target.stride(0);
    weight = made<scalar_t>({rows, k}, norm, [&](int64_t i) {
      const int64_t n = i / k;
      if (!soft) return found[n * row + others[i] * column];
      const int64_t y = labels[n * step];
      return y < 0 || y >= classes ? scalar_t(0) : -found[n * row + y * column];  // an ignored one
    });
  });
  return {loss, gradient, weight, distance, active, degenerate};
}

}  // namespace margin_kernels
