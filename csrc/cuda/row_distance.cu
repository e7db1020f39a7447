// Launcher of row_distance.cuh: one launch forward; backward sorts the uses of the rows by class first.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "on_device.h"
#include "row_distance.cuh"

namespace margin_kernels {
namespace {

using cuda::in;
using cuda::out;

template <class T>
cuda::RowPairs<T> pairs_of(const Tensor& rows, const Tensor& index, const Tensor& target) {
  // Blocks for every tile of a row are the second dimension of a grid, which ends at 65535; a tile has at least 128 elements.
  TORCH_CHECK_VALUE(rows.size(1) <= 65535 * 128, "rows are too long for one launch: ", rows.sizes());
  TORCH_CHECK_VALUE(2 * index.numel() <= std::numeric_limits<int>::max(),
                    "index has too many pairs for one launch: ", index.numel());
  return {in<T>(rows),        rows.stride(0),      rows.size(0),   rows.size(1),
          in<int64_t>(index), in<int64_t>(target), target.size(0), index.size(1)};
}

Tensor row_distance_cuda(const Tensor& rows, const Tensor& index, const Tensor& target, double p) {
  check::row_distance(rows, index, target, p);
  const cuda::OnDevice device(rows);
  const Tensor w = unit_stride_rows(rows), i = index.contiguous(), y = target.contiguous();
  Tensor norms = at::empty(index.sizes(), rows.options().dtype(check::accumulate_type(rows.scalar_type())));
  cuda::with_type(w.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    cuda::row_distance_forward<T>(device.launch, pairs_of<T>(w, i, y), p, out<cuda::acc_t<T>>(norms));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return norms;
}

Tensor row_distance_backward_cuda(const Tensor& grad, const Tensor& rows, const Tensor& index, const Tensor& target,
                                  const Tensor& norm, double p) {
  const cuda::OnDevice device(rows);
  const Tensor w = unit_stride_rows(rows), i = index.contiguous(), y = target.contiguous();
  const Tensor values = norm.contiguous(), grads = grad.to(norm.scalar_type()).contiguous();
  Tensor drows = at::zeros(rows.sizes(), rows.options());
  const auto [sorted, order] = at::sort(at::cat({i.view(-1), y.repeat_interleave(i.size(1))}),
                                        /*stable=*/std::optional<bool>(true), /*dim=*/0, /*descending=*/false);
  const Tensor ties = at::empty({p == 1 ? i.numel() : 0}, i.options());
  const Tensor sums = at::empty({cuda::use_segments(i.numel()), 2, rows.size(1)}, norm.options());
  cuda::with_type(w.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using acc = cuda::acc_t<T>;
    const cuda::RowUses<T> uses{in<int64_t>(sorted), in<int64_t>(order), sorted.numel(), out<acc>(sums), out<T>(drows)};
    cuda::row_distance_backward<T>(device.launch, pairs_of<T>(w, i, y), p, uses, in<acc>(values), in<acc>(grads),
                                   out<int64_t>(ties));
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return drows;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CUDA, m) {
  m.impl("row_distance", row_distance_cuda);
  m.impl("row_distance_backward", row_distance_backward_cuda);
}

}  // namespace margin_kernels
