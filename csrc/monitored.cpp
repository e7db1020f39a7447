#include "monitored.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "ops.h"

namespace margin_kernels {
namespace {

enum Column { kFactor, kPhi, kRest, kKnows, kOtherLoss, kNorm, kPresent, kColumns };

}  // namespace

Tensor read_logit_gradient(const Tensor& g, const Tensor& z, const std::optional<Tensor>& given, double p, double known,
                           double other, double rounding) {
  const at::AutoDispatchBelowADInplaceOrView constant;
  TORCH_CHECK_VALUE(g.is_cpu() && z.is_cpu() && z.dim() == 2 && z.sizes() == g.sizes(),
                    "g and z must have one shape [N, C] on the CPU, got ", g.sizes(), " and ", z.sizes());
  const int64_t rows = z.size(0), classes = z.size(1);
  const auto acc = z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor norm = dual_norm({g}, p, /*batch_dims=*/1);
  const Tensor wide = g.to(acc).contiguous(), logits = z.to(acc);
  const Tensor asked = given ? given->to(at::kLong).contiguous() : Tensor();
  TORCH_CHECK_VALUE(!given || asked.numel() == rows, "the labels must be [", rows, "], got ", asked.sizes());
  Tensor result = at::empty({rows, kColumns}, wide.options());
  Tensor label = at::empty({rows}, wide.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(acc, "read_logit_gradient", [&] {
    const scalar_t* gradient = wide.const_data_ptr<scalar_t>();
    const Tensor norms = norm.to(acc).contiguous();
    const scalar_t* norm_data = norms.const_data_ptr<scalar_t>();
    const int64_t* given_data = given ? asked.const_data_ptr<int64_t>() : nullptr;
    int64_t* labels = label.data_ptr<int64_t>();
    for (int64_t n = 0; n < rows; ++n) {
      const scalar_t* row = gradient + n * classes;
      int64_t y = 0;
      if (given) {
        y = std::min(std::max<int64_t>(given_data[n], 0), classes - 1);
      } else {  // the first of the lowest, or of NaN
        for (int64_t j = 1; j < classes && row[y] == row[y]; ++j) {
          if (!(row[j] >= row[y])) y = j;
        }
      }
      labels[n] = y;
    }
    const auto [gap, nll, phi, uniform, index, normalizer, valid] =
        competitors(logits, label, /*k=*/0, std::numeric_limits<int64_t>::min(), /*uniform=*/false);
    const scalar_t *phis = phi.const_data_ptr<scalar_t>(), *sums = normalizer.const_data_ptr<scalar_t>();
    scalar_t* found = result.data_ptr<scalar_t>();
    Tensor factors = at::empty({rows}, wide.options());
    scalar_t* factor_data = factors.data_ptr<scalar_t>();
    const auto z_data = logits.accessor<const scalar_t, 2>();
    for (int64_t n = 0; n < rows; ++n, found += kColumns) {
      const scalar_t nothing = std::numeric_limits<scalar_t>::quiet_NaN();
      // S = 0: no rival, of which nothing is known.
      const scalar_t total = sums[3 * n + 1] == 0 ? nothing : sums[3 * n + 1];
      const scalar_t lead = z_data[n][labels[n]] - sums[3 * n];
      // 1 - p_y, from the larger of its two parts
      const scalar_t small = std::exp(-std::abs(lead));
      const scalar_t rest = lead >= 0 ? total * small / (1 + total * small) : total / (total + small);
      factor_data[n] = -gradient[n * classes + labels[n]] / rest;
      found[kFactor] = factor_data[n];
      found[kPhi] = total == total ? phis[n] : nothing;
      found[kRest] = rest;
      found[kNorm] = norm_data[n];
      found[kPresent] = 1;
    }
    const Tensor expected =
        competitors_backward(std::nullopt, factors, std::nullopt, std::nullopt, logits, label, index, normalizer)
            .contiguous();
    const scalar_t* expected_data = expected.const_data_ptr<scalar_t>();
    found = result.data_ptr<scalar_t>();
    for (int64_t n = 0; n < rows; ++n, found += kColumns) {
      const scalar_t *row = gradient + n * classes, *should = expected_data + n * classes;
      const int64_t y = labels[n];
      double residual = 0, magnitude = 0;
      for (int64_t j = 0; j < classes; ++j) {
        residual += std::abs(row[j] - should[j]);
        magnitude += std::abs(row[j]);
      }
      residual -= std::abs(row[y] - should[y]);
      const double own = row[y], entry = std::abs(own);
      const bool valid_label = !given || given_data[n] == y, pushed = own < 0;
      found[kKnows] = valid_label && pushed && residual <= known * entry;
      found[kOtherLoss] = valid_label && ((pushed && residual > other * entry + rounding * found[kFactor]) ||
                                          own > rounding * magnitude);
    }
  });
  return result;
}

std::tuple<Tensor, int64_t> monitored_margins(const Tensor& found, const std::vector<Tensor>& norms,
                                              const std::vector<double>& least, double eps) {
  const at::AutoDispatchBelowADInplaceOrView constant;
  const int64_t rows = found.size(0), layers = static_cast<int64_t>(norms.size());
  TORCH_CHECK_VALUE(found.is_cpu() && found.dim() == 2 && found.size(1) == kColumns && found.is_contiguous(),
                    "found must be contiguous and [N, ", static_cast<int64_t>(kColumns), "] on the CPU, got ",
                    found.sizes());
  TORCH_CHECK_VALUE(static_cast<int64_t>(least.size()) == layers, "least must hold ", layers, " numbers, got ",
                    least.size());
  Tensor result = at::empty({rows, layers}, found.options());
  int64_t others = 0;
  AT_DISPATCH_FLOATING_TYPES(found.scalar_type(), "monitored_margins", [&] {
    std::vector<Tensor> wide;
    std::vector<const scalar_t*> data;
    for (const Tensor& norm : norms) {
      TORCH_CHECK_VALUE(norm.is_cpu() && norm.dim() == 1 && norm.size(0) == rows, "each of norms must be [", rows,
                        "] on the CPU, got ", norm.sizes());
      wide.push_back(norm.to(found.scalar_type()).contiguous());
      data.push_back(wide.back().const_data_ptr<scalar_t>());
    }
    const scalar_t* row = found.const_data_ptr<scalar_t>();
    scalar_t* margin = result.data_ptr<scalar_t>();
    const auto eps_ = static_cast<scalar_t>(eps);
    for (int64_t n = 0; n < rows; ++n, row += kColumns) {
      others += row[kOtherLoss] > 0;
      const scalar_t weight = row[kRest] * row[kFactor];
      for (int64_t l = 0; l < layers; ++l, ++margin) {
        const scalar_t norm = data[l][n];
        const bool measured = row[kKnows] > 0 && norm > static_cast<scalar_t>(least[l]) && std::isfinite(norm);
        *margin = measured ? row[kPhi] * weight / (eps_ * weight + norm) : std::numeric_limits<scalar_t>::quiet_NaN();
      }
    }
  });
  return {result, others};
}

}  // namespace margin_kernels
