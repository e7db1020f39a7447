// Norms of a sample's candidates, the nearest boundary, and the step to it. Included once per instruction set.

#include "dual_norm_kernel.h"

namespace margin_kernels::MK_ISA {

template <class scalar_t>
MK_FN bool all_finite(const scalar_t* w, int64_t n) {
  using acc = typename Lane<scalar_t>::acc;
  acc zero = 0;
  for (int64_t i = 0; i < n; ++i) zero += static_cast<acc>(w[i]) * acc(0);
  return zero == 0;
}

// to = distance * d norm / d w;  for MAX on the first of the largest |w_i|
template <Norm norm, class scalar_t>
MK_FN void write_step(const scalar_t* w, int64_t n, double q, typename Lane<scalar_t>::acc value,
                      typename Lane<scalar_t>::acc distance, scalar_t* to) {
  using acc = typename Lane<scalar_t>::acc;
  if constexpr (norm == Norm::MAX) {
    std::fill_n(to, n, static_cast<scalar_t>(acc(0)));
    int64_t i = 0;
    while (i < n && std::fabs(static_cast<acc>(w[i])) != value) ++i;
    if (value > 0) to[i] = static_cast<scalar_t>(math::sign(static_cast<acc>(w[i])) * distance);
  } else {
    row_slope<norm>(w, n, q, value, distance, to);
  }
}

template <Norm norm, class scalar_t>
MK_TARGET void step_rows(const DeepFoolForward<scalar_t>& at, int64_t begin, int64_t end, double q) {
  using acc = typename Lane<scalar_t>::acc;
  constexpr acc nan = std::numeric_limits<acc>::quiet_NaN();
  std::vector<double> sizes(at.k);
  for (int64_t n = begin; n < end; ++n) {
    scalar_t* step = at.step + n * at.length;
    if (at.active && !at.active[n]) {
      std::fill_n(step, at.length, static_cast<scalar_t>(acc(0)));
      at.distance[n] = at.norm[n] = 0;
      at.choice[n] = 0;
      continue;
    }
    norms_of<norm, scalar_t>(
        at.k, at.length, q, [&](int64_t j) MK_TARGET { return at.row(n, j); },
        [&](int64_t j, double value) MK_TARGET { sizes[j] = value; });
    bool usable = true;
    acc distance = 0, chosen = 0;
    int64_t choice = 0;
    for (int64_t j = 0; j < at.k && usable; ++j) {
      const acc gap = at.gap[n * at.k + j];
      // A norm beyond the range of its type can come from finite entries: only then each is looked at.
      usable = !std::isnan(gap) && (std::isfinite(sizes[j]) || all_finite(at.row(n, j), at.length));
      const acc value = static_cast<acc>(sizes[j]), d = math::boundary_distance(gap, value);
      if (j == 0 || d < distance) {
        distance = d;
        chosen = math::is_masked_gap(gap) ? acc(0) : value;  // norm 0: no step and no derivative
        choice = j;
      }
    }
    at.choice[n] = usable ? choice : 0;
    at.distance[n] = usable ? distance : nan;
    at.norm[n] = usable ? chosen : nan;
    if (usable) {
      write_step<norm>(at.row(n, choice), at.length, q, chosen, distance, step);
    } else {
      std::fill_n(step, at.length, static_cast<scalar_t>(nan));
    }
  }
}

}  // namespace margin_kernels::MK_ISA
