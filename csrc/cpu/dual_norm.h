// What the ops that take norms of rows share.
#pragma once

#include <cstdint>

#include "../math/dual_norm.h"

namespace margin_kernels {

using math::with_norm;

// Rows of one layer: row r = (r / inner, r % inner) over the batch dimensions, `length` elements in one dense run.
template <class scalar_t>
struct Rows {
  scalar_t* data;
  int64_t inner, outer_stride, inner_stride, length;
  scalar_t* at(int64_t r) const {
    if (inner == 1) return data + r * outer_stride;
    return data + (r / inner) * outer_stride + (r % inner) * inner_stride;
  }
};

}  // namespace margin_kernels
