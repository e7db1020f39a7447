// A large new tensor lies on pages that the kernel has not handed out yet: with 4 KiB pages the faults cost more than
// the arithmetic. Where transparent huge pages are set to "madvise", one call makes them 2 MiB each.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace margin_kernels {

inline void advise_large_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + tensor.nbytes()) / page * page;
  // A hint: where it is refused, nothing but the speed changes.
  if (end > begin + page) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

}  // namespace margin_kernels
