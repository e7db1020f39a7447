// Norms of differences of gathered rows on the CPU: reads each pair's two rows, the row of the label once for its k
// competitors; O(D) of memory per thread. Backward goes by class: each row of the gradient is written once, from the
// pairs that it takes part in.
#include "../math/row_distance.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "dual_norm.h"
#include "fresh_pages.h"
#include "grain.h"

namespace margin_kernels {

template <class scalar_t>
struct RowPairs {
  const scalar_t* rows;  // [C, D]
  int64_t stride, length, k;
  const int64_t* index;   // [N, k]
  const int64_t* target;  // [N]
  const scalar_t* row(int64_t c) const { return rows + c * stride; }
};

// Where class c is used: place[first[c] .. first[c + 1]), each n (k + 1) + j with j < k a competitor and j = k a label.
struct RowUses {
  std::vector<int64_t> first, place;
};

}  // namespace margin_kernels

#define MK_KERNEL "row_distance_kernel.h"
#include "foreach_isa.h"

namespace margin_kernels {
namespace {

template <class scalar_t>
RowPairs<scalar_t> pairs_of(const Tensor& rows, const Tensor& index, const Tensor& target) {
  return {rows.const_data_ptr<scalar_t>(), rows.stride(0), rows.size(1), index.size(1), index.const_data_ptr<int64_t>(),
          target.const_data_ptr<int64_t>()};
}

RowUses uses_of(const Tensor& index, const Tensor& target, int64_t classes) {
  const auto *i = index.const_data_ptr<int64_t>(), *y = target.const_data_ptr<int64_t>();
  const int64_t n = target.size(0), k = index.size(1);
  const auto class_at = [&](int64_t place) {
    return place % (k + 1) < k ? i[place / (k + 1) * k + place % (k + 1)] : y[place / (k + 1)];
  };
  RowUses uses{std::vector<int64_t>(classes + 2), std::vector<int64_t>(n * (k + 1))};
  for (int64_t place = 0; place < n * (k + 1); ++place) ++uses.first[class_at(place) + 2];
  for (int64_t c = 2; c < classes + 2; ++c) uses.first[c] += uses.first[c - 1];
  for (int64_t place = 0; place < n * (k + 1); ++place) uses.place[uses.first[class_at(place) + 1]++] = place;
  return uses;
}

Tensor row_distance_cpu(const Tensor& rows, const Tensor& index, const Tensor& target, double p) {
  check::row_distance(rows, index, target, p);
  check::classes("target", target, rows.size(0));
  check::classes("index", index, rows.size(0));
  const Tensor w = unit_stride_rows(rows), i = index.contiguous(), y = target.contiguous();
  Tensor norms = at::empty(index.sizes(), rows.options().dtype(check::accumulate_type(rows.scalar_type())));
  const double q = math::dual_exponent(p);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, w.scalar_type(), "row_distance", [&] {
    using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto pairs = pairs_of<scalar_t>(w, i, y);
    acc* out = norms.data_ptr<acc>();
    with_norm(p, [&](auto norm) {
      constexpr auto kind = decltype(norm)::value;
      at::parallel_for(0, y.size(0), grain(pairs.length * (pairs.k + 1)), [&](int64_t begin, int64_t end) {
        MK_DISPATCH(distance_rows<kind>(pairs, begin, end, q, out));
      });
    });
  });
  return norms;
}

Tensor row_distance_backward_cpu(const Tensor& grad, const Tensor& rows, const Tensor& index, const Tensor& target,
                                 const Tensor& norm, double p) {
  const int64_t classes = rows.size(0);
  const Tensor w = unit_stride_rows(rows), i = index.contiguous(), y = target.contiguous();
  const Tensor values = norm.contiguous(), grads = grad.to(norm.scalar_type()).contiguous();
  Tensor drows = at::empty_like(rows, at::MemoryFormat::Contiguous);
  advise_large_pages(drows);
  const RowUses uses = uses_of(i, y, classes);
  const double q = math::dual_exponent(p);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, w.scalar_type(), "row_distance_backward", [&] {
    using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto pairs = pairs_of<scalar_t>(w, i, y);
    with_norm(p, [&](auto norm) {
      constexpr auto kind = decltype(norm)::value;
      at::parallel_for(0, classes, grain(pairs.length), [&](int64_t begin, int64_t end) {
        MK_DISPATCH(gradient_rows<kind>(pairs, uses, begin, end, q, values.const_data_ptr<acc>(),
                                        grads.const_data_ptr<acc>(), drows.data_ptr<scalar_t>()));
      });
    });
  });
  return drows;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) {
  m.impl("row_distance", row_distance_cpu);
  m.impl("row_distance_backward", row_distance_backward_cpu);
}

}  // namespace margin_kernels
