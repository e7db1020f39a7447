// One DeepFool step from the norms of all candidates, which dual_norm.cuh measures: the choice and the step in one
// launch, all on the device, so that a loop of steps never waits for the host.
//
// Forward reads every gradient once and the chosen one again, and writes one step per sample. Backward reads the chosen
// gradient and grad_step twice (the product <u, grad_step> first) and writes the gradient of every candidate once:
// zeros but for the chosen one. Rows are cut into parts of 8192 elements, a block each, by their length alone.
#pragma once

#include "../math/deepfool_step.h"
#include "dual_norm.cuh"

namespace margin_kernels::cuda {

template <class T>
struct DeepFool {
  const acc_t<T>* gap;  // [N, k]
  const T* gradients;   // [N, k, D]
  int64_t outer_stride, inner_stride;
  const bool* active;     // [N] or null: all
  const acc_t<T>* norms;  // [N, k]: dual_norm of the gradients
  int64_t samples, k, length;

  __device__ const T* row(int64_t n, int64_t j) const { return gradients + n * outer_stride + j * inner_stride; }
  __device__ bool is_active(int64_t n) const { return active == nullptr || active[n]; }
};

// The nearest boundary of one sample.
template <class acc>
struct Boundary {
  acc distance, norm;
  int64_t choice;
};

constexpr int64_t kStepPart = 8192;

inline int64_t step_parts(int64_t length) { return length == 0 ? 1 : (length + kStepPart - 1) / kStepPart; }

// The smallest distance, the lowest j of equals; NaN where a gap or a norm is not finite. By the first warp of a block,
// which hands it to all threads.
template <class T>
__device__ __forceinline__ Boundary<acc_t<T>> nearest_boundary(const DeepFool<T>& in, int64_t n) {
  using acc = acc_t<T>;
  __shared__ Boundary<acc> found;
  if (threadIdx.x < 32) {
    acc smallest = static_cast<acc>(HUGE_VAL), poison = 0;
    int64_t choice = in.k;
    for (int64_t j = threadIdx.x; j < in.k; j += 32) {
      const acc gap = in.gap[n * in.k + j], norm = in.norms[n * in.k + j];
      poison += (math::is_masked_gap(gap) ? acc(0) : gap - gap) + (norm - norm);
      const acc distance = math::boundary_distance(gap, norm);
      if (distance < smallest || choice == in.k) {
        smallest = distance;
        choice = j;
      }
    }
    poison = sum_lanes(poison);
    for (int offset = 16; offset > 0; offset /= 2) {
      const acc distance = __shfl_xor_sync(kWarp, smallest, offset);
      const int64_t j = __shfl_xor_sync(kWarp, choice, offset);
      if (distance < smallest || (distance == smallest && j < choice)) {
        smallest = distance;
        choice = j;
      }
    }
    if (threadIdx.x == 0) {
      if (!in.is_active(n)) {
        found = {acc(0), acc(0), 0};
      } else if (poison != poison) {
        found = {poison, poison, 0};
      } else {
        // Norm 0 for a masked class, chosen where all are: no step and no derivative.
        const bool masked = math::is_masked_gap(in.gap[n * in.k + choice]);
        found = {smallest, masked ? acc(0) : in.norms[n * in.k + choice], choice};
      }
    }
  }
  __syncthreads();
  return found;
}

// The first element whose magnitude is `value`, `length` where there is none: for the maximum norm, by a whole block.
template <class T>
__device__ __forceinline__ int64_t first_largest(const T* row, int64_t length, acc_t<T> value) {
  __shared__ int64_t warps[kNormWarps];
  int64_t first = length;
  for (int64_t i = threadIdx.x; i < length && first == length; i += kNormThreads) {
    if (static_cast<acc_t<T>>(fabs(widen(row[i]))) == value) first = i;
  }
  first = reduce_lanes(first, 32, [](int64_t a, int64_t b) { return a < b ? a : b; });
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = first;
  __syncthreads();
  for (int w = 0; w < kNormWarps; ++w) first = warps[w] < first ? warps[w] : first;
  return first;
}

// A block per part of each sample's row; the first one writes what the sample has one of.
template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    deepfool_step_kernel(DeepFool<T> in, double q, int64_t parts,
                         T* step,             // [N, D]
                         acc_t<T>* distance,  // [N]
                         int64_t* choice,     // [N]
                         acc_t<T>* value) {   // [N]: norm of the chosen gradient
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  const int64_t n = blockIdx.x / parts, part = blockIdx.x % parts;
  const Boundary<acc> at = nearest_boundary(in, n);
  if (part == 0 && threadIdx.x == 0) {
    distance[n] = at.distance;
    choice[n] = at.choice;
    value[n] = at.norm;
  }
  const T* row = in.row(n, at.choice);
  T* to = step + n * in.length;
  const int64_t begin = part * kStepPart, end = begin + kStepPart < in.length ? begin + kStepPart : in.length;
  if (at.norm == acc(0) || at.norm != at.norm) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kNormThreads) to[i] = narrow<T>(at.norm);
    return;
  }
  if constexpr (norm == Norm::MAX) {
    const int64_t first = first_largest(row, in.length, at.norm);
    for (int64_t i = begin + threadIdx.x; i < end; i += kNormThreads) {
      to[i] = narrow<T>(i == first ? at.distance * math::sign(widen(row[i])) : acc(0));
    }
  } else {
    const Slope<norm, T> slope(at.norm, at.distance, q, 1);
    const int word = word_of(row), word_to = word_of(to);
    int64_t i = begin + static_cast<int64_t>(threadIdx.x) * size;
    for (; i + size <= end; i += kNormThreads * size) {
      Pack<T> pack = load_pack(row + i, word);
      MK_UNROLL
      for (int j = 0; j < size; ++j) pack.data[j] = narrow<T>(slope(widen(pack.data[j])));
      store_pack(to + i, pack, word_to);
    }
    for (; i < end; ++i) to[i] = narrow<T>(slope(widen(row[i])));
  }
}

// u = d norm / d w for an element of the chosen row
template <Norm norm, class T>
__device__ __forceinline__ double direction(const T* row, int64_t i, double value, double q, int64_t first) {
  const double w = widen(row[i]);
  if constexpr (norm == Norm::MAX) return i == first ? math::sign(w) : 0.0;
  return math::slope<norm>(w, value, q);
}

// <u, grad_step> over each part; for the maximum norm also where its one element lies.
template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    deepfool_product_kernel(DeepFool<T> in, double q, int64_t parts, const int64_t* choice, const acc_t<T>* value,
                            const T* grad_step,  // [N, D]
                            double* products,    // [N, parts]
                            int64_t* firsts) {   // [N]
  const int64_t n = blockIdx.x / parts, part = blockIdx.x % parts;
  const T *row = in.row(n, choice[n]), *v = grad_step + n * in.length;
  const acc_t<T> size = value[n];
  const bool usable = in.is_active(n) && size != acc_t<T>(0) && size == size;
  int64_t first = in.length;
  if constexpr (norm == Norm::MAX) {
    if (usable) first = first_largest(row, in.length, size);  // the same for the whole block
    if (part == 0 && threadIdx.x == 0) firsts[n] = first;
  }
  const int64_t begin = part * kStepPart, end = begin + kStepPart < in.length ? begin + kStepPart : in.length;
  double total = 0;
  if (usable) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kNormThreads) {
      total += direction<norm>(row, i, size, q, first) * widen(v[i]);
    }
  }
  __shared__ double warps[kNormWarps];
  total = sum_lanes(total);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kNormWarps; ++w) total += warps[w];
  products[blockIdx.x] = total;
}

// A block per part of each candidate's row.
template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    deepfool_backward_kernel(DeepFool<T> in, double q, int64_t parts, const int64_t* choice, const acc_t<T>* value,
                             const T* grad_step,             // [N, D] or null
                             const acc_t<T>* grad_distance,  // [N] or null
                             const double* products, const int64_t* firsts,
                             acc_t<T>* dgap,   // [N, k]
                             T* dgradients) {  // [N, k, D]
  using acc = acc_t<T>;
  const int64_t cell = blockIdx.x / parts, part = blockIdx.x % parts, n = cell / in.k, j = cell % in.k;
  const double size = value[n];
  T* to = dgradients + cell * in.length;
  const int64_t begin = part * kStepPart, end = begin + kStepPart < in.length ? begin + kStepPart : in.length;
  const bool none = j != choice[n] || !in.is_active(n) || size == 0;
  if (none || size != size) {
    const acc fill = none ? acc(0) : static_cast<acc>(size);
    if (part == 0 && threadIdx.x == 0) dgap[cell] = fill;
    for (int64_t i = begin + threadIdx.x; i < end; i += kNormThreads) to[i] = narrow<T>(fill);
    return;
  }
  double product = 0;
  for (int64_t p = 0; grad_step && p < parts; ++p) product += products[n * parts + p];
  const double gap = in.gap[cell], distance = fabs(gap) / size;
  const double t = product + (grad_distance ? static_cast<double>(grad_distance[n]) : 0.0);
  if (part == 0 && threadIdx.x == 0) dgap[cell] = static_cast<acc>(math::gap_gradient(gap, size, t));
  const T *row = in.row(n, j), *v = grad_step ? grad_step + n * in.length : nullptr;
  int64_t first = in.length;
  if constexpr (norm == Norm::MAX) first = v ? firsts[n] : first_largest(row, in.length, value[n]);
  for (int64_t i = begin + threadIdx.x; i < end; i += kNormThreads) {
    const double u = direction<norm>(row, i, size, q, first), y = v ? static_cast<double>(widen(v[i])) : 0.0;
    to[i] = narrow<T>(static_cast<acc>(
        math::row_gradient<norm>(static_cast<double>(widen(row[i])), u, y, size, q, distance, t, product)));
  }
}

template <class T, class Launch>
void deepfool_step_forward(const Launch& launch, const DeepFool<T>& in, double p, T* step, acc_t<T>* distance,
                           int64_t* choice, acc_t<T>* value) {
  if (in.samples == 0) return;
  const double q = math::dual_exponent(p);
  const int64_t parts = step_parts(in.length);
  with_norm(p, [&](auto tag) {
    launch(deepfool_step_kernel<decltype(tag)::value, T>, static_cast<unsigned>(in.samples * parts), kNormThreads, 0,
           in, q, parts, step, distance, choice, value);
  });
}

template <class T, class Launch>
void deepfool_step_backward(const Launch& launch, const DeepFool<T>& in, double p, const int64_t* choice,
                            const acc_t<T>* value, const T* grad_step, const acc_t<T>* grad_distance, double* products,
                            int64_t* firsts, acc_t<T>* dgap, T* dgradients) {
  if (in.samples == 0) return;
  const double q = math::dual_exponent(p);
  const int64_t parts = step_parts(in.length);
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    if (grad_step) {
      launch(deepfool_product_kernel<norm, T>, static_cast<unsigned>(in.samples * parts), kNormThreads, 0, in, q, parts,
             choice, value, grad_step, products, firsts);
    }
    launch(deepfool_backward_kernel<norm, T>, static_cast<unsigned>(in.samples * in.k * parts), kNormThreads, 0, in, q,
           parts, choice, value, grad_step, grad_distance, products, firsts, dgap, dgradients);
  });
}

}  // namespace margin_kernels::cuda
