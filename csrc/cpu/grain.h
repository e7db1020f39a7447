// How many rows a task of at::parallel_for takes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace margin_kernels {

// Rows of so many elements for one task: about `least` elements in all, so that small problems stay on one thread.
inline int64_t grain(int64_t elements, int64_t least = 32768) {
  return std::max<int64_t>(1, least / std::max<int64_t>(elements, 1));
}

}  // namespace margin_kernels
