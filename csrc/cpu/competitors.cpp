// Competitors, gaps and cross-entropy on the CPU. Forward reads logits once from memory; backward reads them once more
// and writes dlogits once. Nothing else of size [N, C] is allocated.
#include "../math/competitors.h"

#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "../layout.h"
#include "../ops.h"
#include "fresh_pages.h"
#include "grain.h"

namespace margin_kernels {

template <class scalar_t>
struct CompetitorsForward {
  using acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const scalar_t* logits;  // [N, C]
  int64_t row_stride, classes, k;
  const int64_t* target;  // [N]
  int64_t target_stride, ignore_index;
  int64_t* index;   // [N, k]
  acc* gap;         // [N, k]
  acc* nll;         // [N]
  acc* phi;         // [N]
  acc* uniform;     // [N] or null
  acc* normalizer;  // [N, 3]
  bool* valid;      // [N]
};

// A gradient [N]: null where nothing depends on the output.
template <class acc>
struct PerSample {
  const acc* data;
  int64_t stride;
  acc operator[](int64_t n) const { return data ? data[n * stride] : acc(0); }
};

template <class scalar_t>
struct CompetitorsBackward {
  using acc = typename CompetitorsForward<scalar_t>::acc;
  const scalar_t* logits;  // [N, C]
  int64_t row_stride, classes, k;
  const int64_t* target;  // [N]
  int64_t target_stride;
  const int64_t* index;   // [N, k]
  const acc* normalizer;  // [N, 3]
  const acc* grad_gap;    // [N, k] or null
  int64_t gap_strides[2];
  PerSample<acc> grad_nll, grad_phi, grad_uniform;  // [N]
  scalar_t* dlogits;                                // [N, C] contiguous
};

}  // namespace margin_kernels

#define MK_KERNEL "competitors_kernel.h"
#include "foreach_isa.h"

namespace margin_kernels {
namespace {

// Positions whose rows are brought together at a time: whole lines of memory for each class, few enough for the cache.
constexpr int64_t kTile = 32;

// Logits [N, C] as rows, or [N, C, S], whose N S rows lie across the memory.
struct Rows {
  Tensor logits;
  int64_t positions;  // S, or 0 for [N, C]

  explicit Rows(const Tensor& given)
      : logits(given.dim() == 3 ? given : unit_stride_rows(given)), positions(given.dim() == 3 ? given.size(2) : 0) {}

  int64_t count() const { return logits.size(0) * (positions ? positions : 1); }

  // visit(first, n, s, length) for the tiles of rows [begin, end): rows first.. are the positions s.. of sample n.
  template <class F>
  void tiles(int64_t begin, int64_t end, const F& visit) const {
    for (int64_t row = begin; row < end;) {
      const int64_t n = row / positions, s = row % positions;
      const int64_t length = std::min({kTile, positions - s, end - row});
      visit(row, n, s, length);
      row += length;
    }
  }

  // The logits of a tile, [length, C].
  template <class scalar_t>
  void read(int64_t n, int64_t s, int64_t length, scalar_t* rows) const {
    const int64_t classes = logits.size(1), step = logits.stride(2);
    const scalar_t* z = logits.const_data_ptr<scalar_t>() + n * logits.stride(0) + s * step;
    for (int64_t c = 0; c < classes; ++c, z += logits.stride(1)) {
      for (int64_t t = 0; t < length; ++t) rows[t * classes + c] = z[t * step];
    }
  }
};

// Row r and those behind it as rows 0, 1, ... of other logits.
template <class scalar_t>
CompetitorsForward<scalar_t> from_row(CompetitorsForward<scalar_t> at, int64_t r, const scalar_t* rows) {
  at.logits = rows;
  at.row_stride = at.classes;
  at.target += r * at.target_stride;
  at.index += r * at.k;
  at.gap += r * at.k;
  at.nll += r;
  at.phi += r;
  if (at.uniform) at.uniform += r;
  at.normalizer += 3 * r;
  at.valid += r;
  return at;
}

template <class scalar_t>
CompetitorsBackward<scalar_t> from_row(CompetitorsBackward<scalar_t> at, int64_t r, const scalar_t* rows,
                                       scalar_t* drows) {
  at.logits = rows;
  at.row_stride = at.classes;
  at.target += r * at.target_stride;
  at.index += r * at.k;
  at.normalizer += 3 * r;
  if (at.grad_gap) at.grad_gap += r * at.gap_strides[0];
  for (auto* g : {&at.grad_nll, &at.grad_phi, &at.grad_uniform}) {
    if (g->data) g->data += r * g->stride;
  }
  at.dlogits = drows;
  return at;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> competitors_cpu(const Tensor& logits,
                                                                                   const Tensor& target, int64_t k,
                                                                                   int64_t ignore_index, bool uniform) {
  check::competitors(logits, target, k);
  const Rows rows(logits);
  const int64_t n = rows.count(), classes = logits.size(1);
  const Tensor& z = rows.logits;
  const auto options = logits.options().dtype(check::accumulate_type(logits.scalar_type()));
  // Seven of them: at::empty would send each through the dispatcher.
  Tensor index = at::detail::empty_cpu({n, k}, target.options()), gap = at::detail::empty_cpu({n, k}, options);
  Tensor nll = at::detail::empty_cpu({n}, options), phi = at::detail::empty_cpu({n}, options),
         normalizer = at::detail::empty_cpu({n, 3}, options);
  Tensor uniform_loss = at::detail::empty_cpu({uniform ? n : 0}, options),
         valid = at::detail::empty_cpu({n}, options.dtype(at::kBool));
  std::atomic<int64_t> bad{-1};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, z.scalar_type(), "competitors", [&] {
    using acc = typename CompetitorsForward<scalar_t>::acc;
    const CompetitorsForward<scalar_t> at{z.const_data_ptr<scalar_t>(),
                                          z.stride(0),
                                          classes,
                                          k,
                                          target.const_data_ptr<int64_t>(),
                                          target.stride(0),
                                          ignore_index,
                                          index.data_ptr<int64_t>(),
                                          gap.data_ptr<acc>(),
                                          nll.data_ptr<acc>(),
                                          phi.data_ptr<acc>(),
                                          uniform ? uniform_loss.data_ptr<acc>() : nullptr,
                                          normalizer.data_ptr<acc>(),
                                          valid.data_ptr<bool>()};
    if (rows.positions) {
      at::parallel_for(0, n, grain(classes), [&](int64_t begin, int64_t end) {
        std::vector<scalar_t> tile(kTile * classes);
        rows.tiles(begin, end, [&](int64_t row, int64_t sample, int64_t s, int64_t length) {
          rows.read(sample, s, length, tile.data());
          std::atomic<int64_t> found{-1};
          MK_DISPATCH(forward_rows<scalar_t>(from_row(at, row, tile.data()), 0, length, &found));
          if (found.load() >= 0) bad.store(row + found.load());
        });
      });
      return;
    }
    at::parallel_for(0, n, grain(classes),
                     [&](int64_t begin, int64_t end) { MK_DISPATCH(forward_rows<scalar_t>(at, begin, end, &bad)); });
  });
  if (const int64_t row = bad.load(); row >= 0) {
    TORCH_CHECK_VALUE(false, "target must be in [0, ", classes, "), got ",
                      target.const_data_ptr<int64_t>()[row * target.stride(0)], " at row ", row);
  }
  return {gap, nll, phi, uniform_loss, index, normalizer, valid};
}

Tensor competitors_backward_cpu(const std::optional<Tensor>& grad_gap, const std::optional<Tensor>& grad_nll,
                                const std::optional<Tensor>& grad_phi, const std::optional<Tensor>& grad_uniform,
                                const Tensor& logits, const Tensor& target, const Tensor& index,
                                const Tensor& normalizer) {
  const Rows rows(logits);
  const int64_t n = rows.count(), classes = logits.size(1);
  const Tensor& z = rows.logits;
  Tensor dlogits = at::empty_like(logits, at::MemoryFormat::Contiguous);
  advise_large_pages(dlogits);
  const auto as_acc = [&](const std::optional<Tensor>& t) {
    return t && t->defined() ? t->to(normalizer.scalar_type()) : Tensor();
  };
  const Tensor from_gap = as_acc(grad_gap), from_nll = as_acc(grad_nll), from_phi = as_acc(grad_phi),
               from_uniform = as_acc(grad_uniform);
  const Tensor places = index.contiguous(), scale = normalizer.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, z.scalar_type(), "competitors_backward", [&] {
    using acc = typename CompetitorsForward<scalar_t>::acc;
    const auto per_sample = [](const Tensor& t) {
      return t.defined() ? PerSample<acc>{t.const_data_ptr<acc>(), t.stride(0)} : PerSample<acc>{nullptr, 0};
    };
    CompetitorsBackward<scalar_t> at{};
    at.logits = z.const_data_ptr<scalar_t>();
    at.row_stride = z.stride(0);
    at.classes = classes;
    at.k = index.size(1);
    at.target = target.const_data_ptr<int64_t>();
    at.target_stride = target.stride(0);
    at.index = places.const_data_ptr<int64_t>();
    at.normalizer = scale.const_data_ptr<acc>();
    if (from_gap.defined()) {
      at.grad_gap = from_gap.const_data_ptr<acc>();
      at.gap_strides[0] = from_gap.stride(0);
      at.gap_strides[1] = from_gap.stride(1);
    }
    at.grad_nll = per_sample(from_nll);
    at.grad_phi = per_sample(from_phi);
    at.grad_uniform = per_sample(from_uniform);
    at.dlogits = dlogits.data_ptr<scalar_t>();
    if (rows.positions) {
      at::parallel_for(0, n, grain(classes), [&](int64_t begin, int64_t end) {
        std::vector<scalar_t> tile(2 * kTile * classes);
        scalar_t *z_rows = tile.data(), *dz_rows = z_rows + kTile * classes;
        rows.tiles(begin, end, [&](int64_t row, int64_t sample, int64_t s, int64_t length) {
          rows.read(sample, s, length, z_rows);
          MK_DISPATCH(backward_rows<scalar_t>(from_row(at, row, z_rows, dz_rows), 0, length));
          scalar_t* dz = at.dlogits + sample * classes * rows.positions + s;
          for (int64_t c = 0; c < classes; ++c, dz += rows.positions) {
            for (int64_t t = 0; t < length; ++t) dz[t] = dz_rows[t * classes + c];
          }
        });
      });
      return;
    }
    at::parallel_for(0, n, grain(classes),
                     [&](int64_t begin, int64_t end) { MK_DISPATCH(backward_rows<scalar_t>(at, begin, end)); });
  });
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) {
  m.impl("competitors", competitors_cpu);
  m.impl("competitors_backward", competitors_backward_cpu);
}

}  // namespace margin_kernels
