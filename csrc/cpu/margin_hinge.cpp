// Distance, hinge, clip and aggregation on the CPU: one pass over [N, k, L], numbers that fit in a cache line per row.
#include "../math/margin_hinge.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../check.h"
#include "../ops.h"
#include "grain.h"

namespace margin_kernels {
namespace {

using math::Aggregation;

// The inputs in one type, contiguous; copies only where they are not so already.
template <class acc>
struct Inputs {
  Tensor gap, norm, gamma, cap, weight, min_norm;
  const acc *gap_data, *norm_data, *gamma_data, *cap_data, *weight_data, *min_norm_data;
  int64_t rows, k, layers;
  acc eps, scale;  // scale: 1 / sum of the weights for the mean over layers
  Aggregation aggregation;

  Inputs(const Tensor& gap_, const Tensor& norm_, const Tensor& gamma_, const std::optional<Tensor>& cap_,
         const std::optional<Tensor>& weight_, const std::optional<Tensor>& min_norm_, double eps_,
         std::string_view aggregation_, std::string_view layer_reduction)
      : gap(plain(gap_)),
        norm(plain(norm_)),
        gamma(plain(gamma_)),
        cap(cap_ ? plain(*cap_) : Tensor()),
        weight(weight_ ? plain(*weight_) : Tensor()),
        min_norm(min_norm_ ? plain(*min_norm_) : Tensor()),
        gap_data(gap.const_data_ptr<acc>()),
        norm_data(norm.const_data_ptr<acc>()),
        gamma_data(gamma.const_data_ptr<acc>()),
        cap_data(cap_ ? cap.const_data_ptr<acc>() : nullptr),
        weight_data(weight_ ? weight.const_data_ptr<acc>() : nullptr),
        min_norm_data(min_norm_ ? min_norm.const_data_ptr<acc>() : nullptr),
        rows(gap_.size(0)),
        k(gap_.size(1)),
        layers(norm_.size(2)),
        eps(static_cast<acc>(eps_)),
        scale(1),
        aggregation(math::aggregation_of(aggregation_)) {
    if (layer_reduction == "mean") {
      acc total = 0;
      for (int64_t l = 0; l < layers; ++l) total += weight_data ? weight_data[l] : acc(1);
      scale = 1 / total;
    }
  }

  static Tensor plain(const Tensor& t) {
    constexpr auto type = c10::CppTypeToScalarType<acc>::value;
    return t.scalar_type() == type && t.is_contiguous() ? t : t.to(type).contiguous();
  }

  acc layer_cap(int64_t l) const { return cap_data ? cap_data[l] : std::numeric_limits<acc>::infinity(); }
  acc layer_weight(int64_t l) const {
    const acc own = weight_data ? weight_data[l] : acc(1);
    const bool legal =
        math::legal(gamma_data[l], layer_cap(l), own) && (min_norm_data == nullptr || min_norm_data[l] >= 0);
    return legal ? own * scale : std::numeric_limits<acc>::quiet_NaN();
  }

  acc distance(int64_t n, int64_t j, int64_t l) const {
    return math::signed_distance(gap_data[n * k + j], norm_data[(n * k + j) * layers + l], eps);
  }
  bool left_out(int64_t n, int64_t j, int64_t l) const {
    // No norm is below -inf.
    const acc least = min_norm_data ? min_norm_data[l] : -std::numeric_limits<acc>::infinity();
    return math::left_out(gap_data[n * k + j], norm_data[(n * k + j) * layers + l], least);
  }

  // The competitor with the smallest distance at layer l, the first of equals; the first NaN where there is one; -1
  // where all are left out.
  int64_t nearest(int64_t n, int64_t l) const {
    int64_t best = -1;
    acc smallest = 0;
    for (int64_t j = 0; j < k; ++j) {
      if (left_out(n, j, l)) continue;
      const acc d = distance(n, j, l);
      if (std::isnan(d)) return j;
      if (best < 0 || d < smallest) {
        best = j;
        smallest = d;
      }
    }
    return best;
  }

  struct Mean {
    acc distance;
    int64_t count;
  };
  // Over the pairs that are not left out.
  Mean mean_distance(int64_t n, int64_t l) const {
    acc total = 0;
    int64_t count = 0;
    for (int64_t j = 0; j < k; ++j) {
      if (left_out(n, j, l)) continue;
      total += distance(n, j, l);
      ++count;
    }
    return {count > 0 ? total / count : acc(0), count};
  }

  acc term(acc distance, int64_t l) const { return math::term(distance, gamma_data[l], layer_cap(l)); }

  acc layer_term(int64_t n, int64_t l) const {
    if (aggregation == Aggregation::MAX) {
      const int64_t j = nearest(n, l);
      return j < 0 ? acc(0) : term(distance(n, j, l), l);
    }
    if (aggregation == Aggregation::MEAN_DISTANCE) {
      const Mean mean = mean_distance(n, l);
      return mean.count == 0 ? acc(0) : term(mean.distance, l);
    }
    acc total = 0;
    for (int64_t j = 0; j < k; ++j) {
      if (!left_out(n, j, l)) total += term(distance(n, j, l), l);
    }
    return aggregation == Aggregation::SUM ? total : total / k;
  }

  // d loss[n] / d (-distance[n,j,l]) for every j, at coefficients[j]
  void coefficients(int64_t n, int64_t l, acc* result) const {
    const acc weight = layer_weight(l), gamma = gamma_data[l], cap = layer_cap(l);
    std::fill_n(result, k, acc(0));
    if (aggregation == Aggregation::MAX) {
      const int64_t j = nearest(n, l);
      if (j >= 0 && math::active(distance(n, j, l), gamma, cap)) result[j] = weight;
      return;
    }
    acc share = aggregation == Aggregation::SUM ? weight : weight / k;
    if (aggregation == Aggregation::MEAN_DISTANCE) {
      const Mean mean = mean_distance(n, l);
      if (mean.count == 0 || !math::active(mean.distance, gamma, cap)) return;
      share = weight / mean.count;
    }
    for (int64_t j = 0; j < k; ++j) {
      if (left_out(n, j, l)) continue;
      if (aggregation == Aggregation::MEAN_DISTANCE || math::active(distance(n, j, l), gamma, cap)) result[j] = share;
    }
  }
};

std::tuple<Tensor, Tensor> margin_hinge_cpu(const Tensor& gap, const Tensor& norm, const Tensor& gamma,
                                            const std::optional<Tensor>& cap, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& min_norm, double eps,
                                            std::string_view aggregation, std::string_view layer_reduction) {
  check::margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
  const auto options = gap.options().dtype(check::accumulate_type({gap, norm}));
  Tensor loss = at::empty({gap.size(0)}, options), distance = at::empty(norm.sizes(), options);
  AT_DISPATCH_FLOATING_TYPES(loss.scalar_type(), "margin_hinge", [&] {
    const Inputs<scalar_t> in(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
    auto *loss_data = loss.data_ptr<scalar_t>(), *distance_data = distance.data_ptr<scalar_t>();
    at::parallel_for(0, in.rows, grain(in.k * in.layers, 8192), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t j = 0; j < in.k; ++j) {
          for (int64_t l = 0; l < in.layers; ++l) distance_data[(n * in.k + j) * in.layers + l] = in.distance(n, j, l);
        }
        scalar_t total = 0;
        for (int64_t l = 0; l < in.layers; ++l) total += in.layer_weight(l) * in.layer_term(n, l);
        loss_data[n] = total;
      }
    });
  });
  return {loss, distance};
}

std::tuple<Tensor, Tensor> margin_hinge_backward_cpu(const Tensor& grad, const Tensor& gap, const Tensor& norm,
                                                     const Tensor& gamma, const std::optional<Tensor>& cap,
                                                     const std::optional<Tensor>& weight,
                                                     const std::optional<Tensor>& min_norm, double eps,
                                                     std::string_view aggregation, std::string_view layer_reduction,
                                                     bool norm_grad) {
  const auto type = check::accumulate_type({gap, norm});
  Tensor gap_out = at::empty(gap.sizes(), gap.options().dtype(type));
  Tensor norm_out = norm_grad ? at::empty(norm.sizes(), norm.options().dtype(type)) : at::empty({0}, norm.options());
  const Tensor grads = grad.to(type).contiguous();
  AT_DISPATCH_FLOATING_TYPES(type, "margin_hinge_backward", [&] {
    const Inputs<scalar_t> in(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction);
    const auto* grad_data = grads.const_data_ptr<scalar_t>();
    auto* dgap = gap_out.data_ptr<scalar_t>();
    auto* dnorm = norm_grad ? norm_out.data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, in.rows, grain(in.k * in.layers, 8192), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> c(in.k);
      for (int64_t n = begin; n < end; ++n) {
        std::fill_n(dgap + n * in.k, in.k, scalar_t(0));
        for (int64_t l = 0; l < in.layers; ++l) {
          in.coefficients(n, l, c.data());
          for (int64_t j = 0; j < in.k; ++j) {
            const int64_t at = (n * in.k + j) * in.layers + l;
            // An inactive term has slope 0 even where the norm is 0 or NaN, and so has an infinite gap.
            const bool zero = c[j] == 0 || std::isinf(in.gap_data[n * in.k + j]);
            const scalar_t coefficient = grad_data[n] * c[j];
            if (!zero) dgap[n * in.k + j] += math::gap_slope(coefficient, in.norm_data[at], in.eps);
            if (norm_grad) {
              dnorm[at] = zero ? scalar_t(0)
                               : math::norm_slope(coefficient, in.gap_data[n * in.k + j], in.norm_data[at], in.eps);
            }
          }
        }
      }
    });
  });
  return {gap_out.to(gap.scalar_type()), norm_grad ? norm_out.to(norm.scalar_type()) : norm_out};
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) {
  m.impl("margin_hinge", margin_hinge_cpu);
  m.impl("margin_hinge_backward", margin_hinge_backward_cpu);
}

}  // namespace margin_kernels
