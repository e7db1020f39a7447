// What the ops that take norms of rows share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../math/dual_norm.h"

namespace margin_kernels {

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

// Calls body with std::integral_constant<math::Norm, the norm dual to l_p>.
template <class Body>
void with_norm(double p, const Body& body) {
  using math::Norm;
  switch (math::norm_of(p)) {
    case Norm::MAX:
      return body(std::integral_constant<Norm, Norm::MAX>());
    case Norm::SUM:
      return body(std::integral_constant<Norm, Norm::SUM>());
    case Norm::SQUARE:
      return body(std::integral_constant<Norm, Norm::SQUARE>());
    case Norm::THREE_HALVES:
      return body(std::integral_constant<Norm, Norm::THREE_HALVES>());
    case Norm::GENERAL:
      return body(std::integral_constant<Norm, Norm::GENERAL>());
  }
}

}  // namespace margin_kernels
