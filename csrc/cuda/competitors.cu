// Launcher of competitors.cuh. Targets are checked where the kernel reads them, never on the host: an invalid one gives
// NaN in its row.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "competitors.cuh"
#include "on_device.h"

namespace margin_kernels {
namespace {

using cuda::in;
using cuda::out;

void check_size(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape [N, C] on a GPU, got ", logits.sizes());
  const int64_t n = logits.size(0), classes = logits.size(1);
  // A row is a block of the grid's first dimension, and its parts are in the second.
  TORCH_CHECK_VALUE(classes <= int64_t{1} << 28 && n <= 0x7fffffff,
                    "logits are too large for one launch: ", logits.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> competitors_cuda(const Tensor& logits,
                                                                                    const Tensor& target, int64_t k,
                                                                                    int64_t ignore_index,
                                                                                    bool uniform) {
  check::competitors(logits, target, k);
  check_size(logits);
  const cuda::OnDevice device(logits);
  const int64_t n = logits.size(0), classes = logits.size(1);
  const Tensor z = unit_stride_rows(logits);
  const auto options = logits.options().dtype(check::accumulate_type(logits.scalar_type()));
  Tensor index = at::empty({n, k}, target.options()), gap = at::empty({n, k}, options);
  Tensor nll = at::empty({n}, options), phi = at::empty({n}, options), normalizer = at::empty({n, 3}, options);
  Tensor uniform_loss = at::empty({uniform ? n : 0}, options);
  cuda::with_type(z.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    const auto [lists, sums] = cuda::competitors_workspace<T>(n, static_cast<int>(classes), static_cast<int>(k));
    const Tensor values = at::empty({lists}, options), indices = at::empty({lists}, options.dtype(at::kInt));
    static_assert(sizeof(cuda::SumExp<acc>) == 4 * sizeof(acc));
    const Tensor totals = at::empty({4 * sums}, options);
    const cuda::CompetitorsIn<T> arguments{in<T>(z),
                                           z.stride(0),
                                           in<int64_t>(target),
                                           target.stride(0),
                                           ignore_index,
                                           n,
                                           static_cast<int>(classes),
                                           static_cast<int>(k),
                                           out<int64_t>(index),
                                           out<acc>(gap),
                                           out<acc>(nll),
                                           out<acc>(phi),
                                           uniform ? out<acc>(uniform_loss) : nullptr,
                                           out<acc>(normalizer)};
    cuda::competitors_forward(device.launch, arguments,
                              {out<acc>(values), out<int>(indices), out<cuda::SumExp<acc>>(totals)});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {gap, nll, phi, uniform_loss, index, normalizer, target.ne(ignore_index)};
}

Tensor competitors_backward_cuda(const std::optional<Tensor>& grad_gap, const std::optional<Tensor>& grad_nll,
                                 const std::optional<Tensor>& grad_phi, const std::optional<Tensor>& grad_uniform,
                                 const Tensor& logits, const Tensor& target, const Tensor& index,
                                 const Tensor& normalizer) {
  check_size(logits);
  const cuda::OnDevice device(logits);
  const Tensor z = unit_stride_rows(logits);
  Tensor dlogits = at::empty_like(logits, at::MemoryFormat::Contiguous);
  const auto as_acc = [&](const std::optional<Tensor>& t) {
    return t && t->defined() ? t->to(normalizer.scalar_type()) : Tensor();
  };
  const Tensor from_gap = as_acc(grad_gap), from_nll = as_acc(grad_nll), from_phi = as_acc(grad_phi),
               from_uniform = as_acc(grad_uniform);
  const Tensor places = index.contiguous(), scale = normalizer.contiguous();
  cuda::with_type(z.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    cuda::CompetitorsBackwardIn<T> arguments{};
    arguments.logits = in<T>(z);
    arguments.row_stride = z.stride(0);
    arguments.target = in<int64_t>(target);
    arguments.target_stride = target.stride(0);
    arguments.rows = logits.size(0);
    arguments.classes = static_cast<int>(logits.size(1));
    arguments.k = static_cast<int>(index.size(1));
    arguments.index = in<int64_t>(places);
    arguments.normalizer = in<acc>(scale);
    if (from_gap.defined()) {
      arguments.grad_gap = in<acc>(from_gap);
      arguments.gap_strides[0] = from_gap.stride(0);
      arguments.gap_strides[1] = from_gap.stride(1);
    }
    const auto per_sample = [](const Tensor& t) {
      return t.defined() ? cuda::PerSample<acc>{in<acc>(t), t.stride(0)} : cuda::PerSample<acc>{nullptr, 0};
    };
    arguments.grad_nll = per_sample(from_nll);
    arguments.grad_phi = per_sample(from_phi);
    arguments.grad_uniform = per_sample(from_uniform);
    arguments.dlogits = out<T>(dlogits);
    cuda::competitors_backward(device.launch, arguments);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CUDA, m) {
  m.impl("competitors", competitors_cuda);
  m.impl("competitors_backward", competitors_backward_cuda);
}

}  // namespace margin_kernels
