// || w_i - w_y ||_q for two rows w_i, w_y: power and root of dual_norm.h over the differences.
//   d norm / d w_i = slope(w_i - w_y),   d norm / d w_y = -slope(w_i - w_y)
#pragma once

#include "dual_norm.h"

namespace margin_kernels::math {

MK_HOST_DEVICE bool is_class(int64_t i, int64_t classes) { return i >= 0 && i < classes; }

// One element of d norm / d w_i: 0 where the norm is 0, as for i = y. Not for MAX (even split over ties).
template <Norm norm, class T>
MK_HOST_DEVICE T pair_slope(T w_i, T w_y, T n, T q) {
  return n == T(0) ? T(0) : slope<norm>(w_i - w_y, n, q);
}

}  // namespace margin_kernels::math
