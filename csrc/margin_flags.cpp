#include "margin_flags.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

namespace margin_kernels {

using at::Tensor;

std::pair<Tensor, Tensor> margin_flags(const Tensor& gap, const Tensor& norm, const Tensor& distance,
                                       const Tensor& gamma, const Tensor& cap, const Tensor& min_norm,
                                       const Tensor& valid) {
  const at::AutoDispatchBelowADInplaceOrView constant;
  TORCH_CHECK_VALUE(distance.is_cpu() && norm.dim() == 3 && norm.sizes() == distance.sizes() &&
                        gap.sizes() == norm.sizes().slice(0, 2) && valid.sizes() == norm.sizes().slice(0, 1),
                    "gap must have shape [N, k], norm and distance [N, k, L], valid [N], on the CPU, got ", gap.sizes(),
                    ", ", norm.sizes(), ", ", distance.sizes(), " and ", valid.sizes());
  TORCH_CHECK_TYPE(valid.scalar_type() == at::kBool, "valid must be bool, got ", valid.scalar_type());
  const int64_t rows = norm.size(0), k = norm.size(1), layers = norm.size(2);
  for (const Tensor& number : {gamma, cap, min_norm}) {
    TORCH_CHECK_VALUE(number.is_cpu() && number.dim() == 1 && number.size(0) == layers, "gamma, cap and min_norm must ",
                      "have shape [", layers, "] on the CPU, got ", number.sizes());
  }
  const auto options = distance.options().dtype(at::kBool);
  Tensor active = at::empty(norm.sizes(), options), degenerate = at::empty(norm.sizes(), options);
  AT_DISPATCH_FLOATING_TYPES(distance.scalar_type(), "margin_flags", [&] {
    // Conversions to the wider type change no value.
    const auto plain = [&](const Tensor& t) { return t.to(distance.scalar_type()).contiguous(); };
    const Tensor gaps = plain(gap), norms = plain(norm), distances = plain(distance);
    const Tensor gammas = plain(gamma), caps = plain(cap), leasts = plain(min_norm), valids = valid.contiguous();
    const auto *gap_data = gaps.const_data_ptr<scalar_t>(), *norm_data = norms.const_data_ptr<scalar_t>();
    const auto *distance_data = distances.const_data_ptr<scalar_t>(), *gamma_data = gammas.const_data_ptr<scalar_t>();
    const auto *cap_data = caps.const_data_ptr<scalar_t>(), *least_data = leasts.const_data_ptr<scalar_t>();
    const bool* valid_data = valids.const_data_ptr<bool>();
    bool *active_data = active.data_ptr<bool>(), *degenerate_data = degenerate.data_ptr<bool>();
    for (int64_t n = 0, at = 0; n < rows; ++n) {
      for (int64_t j = 0; j < k; ++j) {
        const scalar_t g = gap_data[n * k + j];
        const bool number = valid_data[n] && g == g;
        for (int64_t l = 0; l < layers; ++l, ++at) {
          const scalar_t shortfall = gamma_data[l] - distance_data[at];
          const bool out = number && norm_data[at] <= least_data[l];
          degenerate_data[at] = out;
          active_data[at] = valid_data[n] && !out && shortfall > 0 && shortfall < cap_data[l];
        }
      }
    }
  });
  return {active, degenerate};
}

}  // namespace margin_kernels
