// How the kernels want their rows in memory, on the CPU and on a GPU alike: native where it is so, else one copy.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace margin_kernels {

using at::Tensor;

// In float64 where the sums are.
inline Tensor widened(const Tensor& t, at::ScalarType acc) { return acc == at::kDouble ? t.to(at::kDouble) : t; }

inline std::vector<Tensor> in_float64(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(t.to(at::kDouble));
  return result;
}

// Copies of `values` in the layout and the type of `like`.
inline std::vector<Tensor> restored(const std::vector<Tensor>& values, at::TensorList like) {
  std::vector<Tensor> result;
  for (size_t i = 0; i < values.size(); ++i) result.push_back(at::empty_like(like[i]).copy_(values[i]));
  return result;
}

// [N, C] with neighbouring elements of a row side by side
inline Tensor unit_stride_rows(const Tensor& t) { return t.stride(1) == 1 ? t : t.contiguous(); }

// Elements of a row: the dimensions behind the batch.
inline int64_t row_length(const Tensor& t, int64_t batch_dims) {
  int64_t length = 1;
  for (int64_t d = batch_dims; d < t.dim(); ++d) length *= t.size(d);
  return length;
}

// Do the dimensions behind the batch fill one run of memory, in any order? (channels_last does; a norm sees no order.)
inline bool dense_rows(const Tensor& t, int64_t batch_dims) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = batch_dims; d < t.dim(); ++d) {
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Itself where the dimensions behind the batch fill one run of memory in their own order, else a contiguous copy.
inline Tensor contiguous_rows(const Tensor& t, int64_t batch_dims) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= batch_dims; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return t.contiguous();
    expected *= t.size(d);
  }
  return t;
}

}  // namespace margin_kernels
