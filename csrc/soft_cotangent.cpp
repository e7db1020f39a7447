#include "soft_cotangent.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/where.h>

#include <limits>

#include "ops.h"

namespace margin_kernels {

Tensor soft_cotangent(const Tensor& logits, const Tensor& target, const Tensor& counted) {
  const at::AutoDispatchBelowADInplaceOrView constant;
  // Samples that are not counted are ignored ones: NaN in their logits is nobody's.
  constexpr int64_t kIgnored = std::numeric_limits<int64_t>::min();
  const auto [gap, nll, phi, uniform, index, normalizer, valid] =
      competitors(logits, at::where(counted, target, kIgnored), /*k=*/0, kIgnored, /*uniform=*/false);
  const auto label_is_masked = phi.eq(-std::numeric_limits<double>::infinity()).logical_and_(counted);
  return competitors_backward(std::nullopt, label_is_masked.to(nll.scalar_type()), counted.to(phi.scalar_type()).neg_(),
                              std::nullopt, logits, target, index, normalizer);
}

}  // namespace margin_kernels
