// Launcher of one_to_n.cuh: columns, their totals, the loss; with cross-entropy the rows too.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "on_device.h"
#include "one_to_n.cuh"

namespace margin_kernels {
namespace {

using cuda::in;
using cuda::out;

template <class T>
cuda::OneToN<T> logits_of(const Tensor& z, const Tensor& y, double delta) {
  // Tiles of columns are the second dimension of a grid, which ends at 65535; a tile of so many has at least 64 columns.
  TORCH_CHECK_VALUE(z.size(1) <= 65535 * 64 && z.size(0) <= std::numeric_limits<int>::max(),
                    "logits are too large for one launch: ", z.sizes());
  return {in<T>(z), z.stride(0), z.size(0), z.size(1), in<int64_t>(y), static_cast<cuda::acc_t<T>>(delta)};
}

std::tuple<Tensor, Tensor, Tensor> one_to_n_cuda(const Tensor& logits, const Tensor& target, double delta,
                                                 std::string_view bound, bool cross_entropy) {
  check::one_to_n(logits, target, delta, bound);
  const cuda::OnDevice device(logits);
  const int64_t n = logits.size(0), classes = logits.size(1);
  const Tensor z = unit_stride_rows(logits), y = target.contiguous();
  const auto options = logits.options().dtype(check::accumulate_type(logits.scalar_type()));
  Tensor loss = at::empty({n}, options), column = at::empty({classes}, options);
  Tensor normalizer = at::empty({cross_entropy ? n : 0}, options);
  cuda::with_type(z.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    const Tensor partials = at::empty({cuda::forward_tiles<T>(n, classes).chunks, classes, 2}, options);
    cuda::one_to_n_forward(device.launch, logits_of<T>(z, y, delta), bound == "positive",
                           out<cuda::LogSum<acc>>(partials), out<acc>(loss), out<acc>(column),
                           cross_entropy ? out<acc>(normalizer) : nullptr);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, column, normalizer};
}

Tensor one_to_n_backward_cuda(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& column,
                              const Tensor& normalizer, double delta, std::string_view bound, bool cross_entropy) {
  const cuda::OnDevice device(logits);
  const Tensor z = unit_stride_rows(logits), y = target.contiguous();
  const Tensor against = column.contiguous(), rows = normalizer.contiguous();
  const Tensor grads = grad.to(column.scalar_type()).contiguous();
  const Tensor samples = at::empty({logits.size(0), 4}, column.options());
  const Tensor totals = at::empty({logits.size(1), 2}, column.options());
  const Tensor segments =
      at::empty({cuda::one_to_n_segments(logits.size(0)), logits.size(1)}, column.options().dtype(at::kDouble));
  Tensor dlogits = at::empty_like(logits, at::MemoryFormat::Contiguous);
  cuda::with_type(z.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    cuda::one_to_n_backward(device.launch, logits_of<T>(z, y, delta), bound == "positive", in<acc>(grads),
                            in<acc>(against), cross_entropy ? in<acc>(rows) : nullptr,
                            out<cuda::SampleSlope<acc>>(samples), out<double>(segments), out<cuda::LogSum<acc>>(totals),
                            out<T>(dlogits));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CUDA, m) {
  m.impl("one_to_n", one_to_n_cuda);
  m.impl("one_to_n_backward", one_to_n_backward_cuda);
}

}  // namespace margin_kernels
