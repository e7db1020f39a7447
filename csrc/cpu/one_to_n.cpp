// 1-to-N loss on the CPU. Forward reads logits once (with cross-entropy twice) and keeps one maximum and one sum per
// column for every 1024 rows; backward reads them once more and writes dlogits once. Nothing else of size [N, C] is
// allocated. Rows and columns are cut into fixed pieces, so the number of threads changes no bit of the result.
#include "../math/one_to_n.h"

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
#include "fresh_pages.h"
#include "grain.h"

namespace margin_kernels {

template <class scalar_t>
struct OneToNLogits {
  using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const scalar_t* logits;  // [N, C]
  int64_t row_stride, samples, classes;
  const int64_t* target;  // [N]
  acc delta;
};

template <class scalar_t>
struct OneToNBackward {
  using acc = typename OneToNLogits<scalar_t>::acc;
  OneToNLogits<scalar_t> in;
  const acc* total;       // [C]: S_c = sum of grad_i s_i over y_i = c; NaN where the column is
  const acc* shift;       // [C]: A_c (- delta for "positive"), 0 where it is not finite
  const acc* normalizer;  // [N]: row logsumexp, or null
  const acc* grad;        // [N]
  const acc* share;       // [N]: s_i
  scalar_t* dlogits;      // [N, C] contiguous
};

}  // namespace margin_kernels

#define MK_KERNEL "one_to_n_kernel.h"
#include "foreach_isa.h"

namespace margin_kernels {
namespace {

constexpr int64_t kChunkRows = 1024, kBlockColumns = 256;  // a task of the forward pass; a multiple of every vector

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

template <class scalar_t>
OneToNLogits<scalar_t> logits_of(const Tensor& z, const Tensor& y, double delta) {
  using acc = typename OneToNLogits<scalar_t>::acc;
  return {z.const_data_ptr<scalar_t>(), z.stride(0), z.size(0), z.size(1), y.const_data_ptr<int64_t>(),
          static_cast<acc>(delta)};
}

// A [C] from the maxima and sums of the chunks, in their order
template <class acc>
void columns(const acc* max, const double* sum, int64_t chunks, int64_t padded, int64_t classes, double delta,
             bool positive, acc* out) {
  at::parallel_for(0, classes, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      acc top = static_cast<acc>(-delta);
      for (int64_t i = 0; i < chunks; ++i) top = std::max(top, max[i * padded + c]);
      double total = 0;
      for (int64_t i = 0; i < chunks; ++i) {
        total += sum[i * padded + c] * std::exp(static_cast<double>(max[i * padded + c] - top));
      }
      out[c] = static_cast<acc>(top + std::log(total) + (positive ? delta : 0.0));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> one_to_n_cpu(const Tensor& logits, const Tensor& target, double delta,
                                                std::string_view bound, bool cross_entropy) {
  check::one_to_n(logits, target, delta, bound);
  const int64_t n = logits.size(0), classes = logits.size(1);
  check::classes("target", target, classes);
  const Tensor z = unit_stride_rows(logits), y = target.contiguous();
  const auto options = logits.options().dtype(check::accumulate_type(logits.scalar_type()));
  Tensor loss = at::empty({n}, options), column = at::empty({classes}, options);
  Tensor normalizer = at::empty({cross_entropy ? n : 0}, options);
  const int64_t chunks = pieces(n, kChunkRows), blocks = pieces(classes, kBlockColumns);
  const int64_t padded = pieces(classes, 16) * 16;
  const Tensor maxima = at::empty({chunks, padded}, options);
  const Tensor sums = at::empty({chunks, padded}, options.dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, z.scalar_type(), "one_to_n", [&] {
    const auto in = logits_of<scalar_t>(z, y, delta);
    using acc = typename OneToNLogits<scalar_t>::acc;
    acc *max = maxima.data_ptr<acc>(), *column_data = column.data_ptr<acc>(), *rows = normalizer.data_ptr<acc>();
    double* sum = sums.data_ptr<double>();
    const int64_t task = std::min(n, kChunkRows) * std::min(classes, kBlockColumns);
    at::parallel_for(0, chunks * blocks, task == 0 ? 1 : pieces(32768, task), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t / blocks * kChunkRows, c = t % blocks * kBlockColumns;
        const int64_t place = t / blocks * padded + c;
        const int64_t row_end = std::min(n, row + kChunkRows), column_end = std::min(classes, c + kBlockColumns);
        MK_DISPATCH(column_sums<scalar_t>(in, row, row_end, c, column_end, max + place, sum + place));
      }
    });
    columns(max, sum, chunks, padded, classes, delta, bound == "positive", column_data);
    if (cross_entropy) {
      at::parallel_for(0, n, grain(classes),
                       [&](int64_t begin, int64_t end) { MK_DISPATCH(row_logsumexp<scalar_t>(in, begin, end, rows)); });
    }
    acc* out = loss.data_ptr<acc>();
    at::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const acc against = column_data[in.target[i]];
        const acc a = math::bounded_label(static_cast<acc>(in.logits[i * in.row_stride + in.target[i]]), in.delta);
        out[i] =
            cross_entropy ? math::one_to_n_cross_entropy_loss(against, rows[i], a) : math::one_to_n_loss(against, a);
      }
    });
  });
  return {loss, column, normalizer};
}

Tensor one_to_n_backward_cpu(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& column,
                             const Tensor& normalizer, double delta, std::string_view bound, bool cross_entropy) {
  const int64_t n = logits.size(0), classes = logits.size(1);
  const Tensor z = unit_stride_rows(logits), y = target.contiguous();
  const Tensor against = column.contiguous(), rows = normalizer.contiguous();
  const Tensor grads = grad.to(column.scalar_type()).contiguous();
  Tensor dlogits = at::empty_like(logits, at::MemoryFormat::Contiguous);
  advise_large_pages(dlogits);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, z.scalar_type(), "one_to_n_backward", [&] {
    using acc = typename OneToNLogits<scalar_t>::acc;
    const auto in = logits_of<scalar_t>(z, y, delta);
    const acc *grad_data = grads.const_data_ptr<acc>(), *a_data = against.const_data_ptr<acc>();
    const acc* row_data = cross_entropy ? rows.const_data_ptr<acc>() : nullptr;
    std::vector<acc> share(n), total(classes + 16), shift(classes + 16);
    at::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const acc own = static_cast<acc>(in.logits[i * in.row_stride + in.target[i]]);
        const acc positive = cross_entropy ? row_data[i] : math::bounded_label(own, in.delta);
        share[i] = math::negative_share(a_data[in.target[i]], positive);
      }
    });
    std::vector<double> sums(classes);
    for (int64_t i = 0; i < n; ++i) sums[in.target[i]] += static_cast<double>(grad_data[i]) * share[i];
    for (int64_t c = 0; c < classes; ++c) {
      total[c] = std::isnan(a_data[c]) ? a_data[c] : static_cast<acc>(sums[c]);
      shift[c] = std::isfinite(a_data[c]) ? a_data[c] - (bound == "positive" ? in.delta : acc(0)) : acc(0);
    }
    const OneToNBackward<scalar_t> at{
        in, total.data(), shift.data(), row_data, grad_data, share.data(), dlogits.data_ptr<scalar_t>()};
    at::parallel_for(0, n, grain(classes),
                     [&](int64_t begin, int64_t end) { MK_DISPATCH(gradient_rows<scalar_t>(at, begin, end)); });
  });
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) {
  m.impl("one_to_n", one_to_n_cpu);
  m.impl("one_to_n_backward", one_to_n_backward_cpu);
}

}  // namespace margin_kernels
