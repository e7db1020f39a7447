// One DeepFool step from the norms of all candidates, which dual_norm.cuh measures: the choice and the step in one
// launch, all on the device, so that a loop of steps never waits for the host.
//
// Forward reads every gradient once and the chosen one again, and writes one step per sample. Backward reads the chosen
// gradient and grad_step twice (the product <u, grad_step> first) and writes the gradient of every candidate once:
// zeros but for the chosen one. Rows are cut into parts of 8192 elements, a block each, by their length alone; a thread
// has up to four loads of 16 bytes under way. For the maximum norm, whose step is one element, a kernel of its own looks
// for that element part by part; the others take the first part that has one.
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

// body(i, packs) for the whole packs of elements [begin, end) at i, i + kNormThreads packs, ..., up to four loads before any
// use; rest(i) for each element behind the last whole pack.
template <class T, int rows, class Body, class Rest>
__device__ __forceinline__ void over_part(const T* const (&from)[rows], int64_t begin, int64_t end, const Body& body,
                                          const Rest& rest) {
  constexpr int size = Pack<T>::size, at_once = 4 / rows;
  constexpr int64_t stride = kNormThreads * size;
  int words[rows];
  MK_UNROLL
  for (int r = 0; r < rows; ++r) words[r] = word_of(from[r]);
  int64_t i = begin + static_cast<int64_t>(threadIdx.x) * size;
  for (; i + (at_once - 1) * stride + size <= end; i += at_once * stride) {
    Pack<T> packs[at_once][rows];
    MK_UNROLL
    for (int l = 0; l < at_once; ++l) {
      MK_UNROLL
      for (int r = 0; r < rows; ++r) packs[l][r] = load_pack(from[r] + i + l * stride, words[r]);
    }
    MK_UNROLL
    for (int l = 0; l < at_once; ++l) body(i + l * stride, packs[l]);
  }
  for (; i + size <= end; i += stride) {
    Pack<T> packs[rows];
    MK_UNROLL
    for (int r = 0; r < rows; ++r) packs[r] = load_pack(from[r] + i, words[r]);
    body(i, packs);
  }
  for (; i < end; ++i) rest(i);
}

// Elements [begin, end) of a row become `value`.
template <class T>
__device__ __forceinline__ void fill_part(T* to, int64_t begin, int64_t end, T value) {
  constexpr int size = Pack<T>::size;
  const int word = word_of(to);
  Pack<T> pack;
  MK_UNROLL
  for (int j = 0; j < size; ++j) pack.data[j] = value;
  int64_t i = begin + static_cast<int64_t>(threadIdx.x) * size;
  for (; i + size <= end; i += kNormThreads * size) store_pack(to + i, pack, word);
  for (; i < end; ++i) to[i] = value;
}

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// By all threads of a block.
__device__ __forceinline__ int64_t smallest_of_block(int64_t value) {
  __shared__ int64_t warps[kNormWarps];
  value = reduce_lanes(value, 32, smaller);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < kNormWarps; ++w) value = smaller(value, warps[w]);
  return value;
}

struct Part {
  int64_t n, number, begin, end;
  __device__ Part(int64_t block, int64_t parts, int64_t length)
      : n(block / parts), number(block % parts), begin(number * kStepPart), end(begin + kStepPart) {
    if (end > length) end = length;
  }
};

// The smallest of firsts [parts].
__device__ __forceinline__ int64_t first_of(const int64_t* firsts, int64_t parts) {
  int64_t first = firsts[0];
  for (int64_t p = 1; p < parts; ++p) first = smaller(first, firsts[p]);
  return first;
}

// By the block of the first part.
template <class acc>
__device__ __forceinline__ void write_boundary(const Boundary<acc>& at, const Part& part, acc* distance,
                                               int64_t* choice, acc* value) {
  if (part.number != 0 || threadIdx.x != 0) return;
  distance[part.n] = at.distance;
  choice[part.n] = at.choice;
  value[part.n] = at.norm;
}

// The first element of each part whose magnitude is the norm, `length` where there is none.
template <class T>
__device__ __forceinline__ void find_first(const DeepFool<T>& in, const Part& part, const Boundary<acc_t<T>>& at,
                                           int64_t* firsts) {  // [N, parts]
  int64_t first = in.length;
  const T* const from[1] = {in.row(part.n, at.choice)};
  over_part(
      from, part.begin, part.end,
      [&](int64_t i, const Pack<T>(&packs)[1]) {
        MK_UNROLL
        for (int j = Pack<T>::size - 1; j >= 0; --j) {
          if (static_cast<acc_t<T>>(fabs(widen(packs[0].data[j]))) == at.norm && i + j < first) first = i + j;
        }
      },
      [&](int64_t i) {
        if (static_cast<acc_t<T>>(fabs(widen(from[0][i]))) == at.norm && i < first) first = i;
      });
  first = smallest_of_block(first);
  if (threadIdx.x == 0) firsts[blockIdx.x] = first;
}

// For the maximum norm, forward: chooses too, and writes what the sample has one of.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    deepfool_choose_kernel(DeepFool<T> in, int64_t parts, acc_t<T>* distance, int64_t* choice, acc_t<T>* value,
                           int64_t* firsts) {
  const Part part(blockIdx.x, parts, in.length);
  const Boundary<acc_t<T>> at = nearest_boundary(in, part.n);
  write_boundary(at, part, distance, choice, value);
  find_first(in, part, at, firsts);
}

// Backward, which is told the choice.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    deepfool_first_kernel(DeepFool<T> in, int64_t parts, const int64_t* choice, const acc_t<T>* value,
                          int64_t* firsts) {
  const Part part(blockIdx.x, parts, in.length);
  find_first(in, part, {acc_t<T>(0), value[part.n], choice[part.n]}, firsts);
}

// A block per part of each sample's row; the first one writes what the sample has one of.
template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    deepfool_step_kernel(DeepFool<T> in, double q, int64_t parts,
                         T* step,                  // [N, D]
                         acc_t<T>* distance,       // [N]
                         int64_t* choice,          // [N]
                         acc_t<T>* value,          // [N]: norm of the chosen gradient
                         const int64_t* firsts) {  // [N, parts], for the maximum norm, which has the others too
  using acc = acc_t<T>;
  const Part part(blockIdx.x, parts, in.length);
  T* to = step + part.n * in.length;
  Boundary<acc> at{};
  if constexpr (norm == Norm::MAX) {
    at = {distance[part.n], value[part.n], choice[part.n]};
  } else {
    at = nearest_boundary(in, part.n);
    write_boundary(at, part, distance, choice, value);
  }
  const T* row = in.row(part.n, at.choice);
  if (at.norm == acc(0) || at.norm != at.norm) {
    fill_part(to, part.begin, part.end, narrow<T>(at.norm));
    return;
  }
  if constexpr (norm == Norm::MAX) {
    const int64_t first = first_of(firsts + part.n * parts, parts);
    fill_part(to, part.begin, part.end, narrow<T>(acc(0)));
    if (first < part.begin || first >= part.end) return;
    __syncthreads();
    if (threadIdx.x == 0) to[first] = narrow<T>(at.distance * math::sign(widen(row[first])));
  } else {
    const Slope<norm, T> slope(at.norm, at.distance, q, 1);
    const int word_to = word_of(to);
    const T* const from[1] = {row};
    over_part(
        from, part.begin, part.end,
        [&](int64_t i, const Pack<T>(&packs)[1]) {
          Pack<T> pack;
          MK_UNROLL
          for (int j = 0; j < Pack<T>::size; ++j) pack.data[j] = narrow<T>(slope(widen(packs[0].data[j])));
          store_pack(to + i, pack, word_to);
        },
        [&](int64_t i) { to[i] = narrow<T>(slope(widen(row[i]))); });
  }
}

// <u, grad_step> over each part. For the maximum norm it is one product, of the part that has the element.
template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    deepfool_product_kernel(DeepFool<T> in, double q, int64_t parts, const int64_t* choice, const acc_t<T>* value,
                            const T* grad_step,     // [N, D]
                            const int64_t* firsts,  // [N, parts], for the maximum norm
                            double* products) {     // [N, parts]
  using acc = acc_t<T>;
  const Part part(blockIdx.x, parts, in.length);
  const T *row = in.row(part.n, choice[part.n]), *v = grad_step + part.n * in.length;
  const acc size = value[part.n];
  const bool usable = in.is_active(part.n) && size != acc(0) && size == size;
  double total = 0;
  if constexpr (norm == Norm::MAX) {
    if (threadIdx.x != 0) return;
    const int64_t first = first_of(firsts + part.n * parts, parts);
    if (usable && first >= part.begin && first < part.end) {
      total = math::sign(static_cast<double>(widen(row[first]))) * widen(v[first]);
    }
    products[blockIdx.x] = total;
  } else {
    if (usable) {
      const Slope<norm, T> slope(size, acc(1), q, 1);
      const T* const from[2] = {row, v};
      over_part(
          from, part.begin, part.end,
          [&](int64_t, const Pack<T>(&packs)[2]) {
            MK_UNROLL
            for (int j = 0; j < Pack<T>::size; ++j) {
              total += static_cast<double>(slope(widen(packs[0].data[j]))) * widen(packs[1].data[j]);
            }
          },
          [&](int64_t i) { total += static_cast<double>(slope(widen(row[i]))) * widen(v[i]); });
    }
    __shared__ double warps[kNormWarps];
    total = sum_lanes(total);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kNormWarps; ++w) total += warps[w];
    products[blockIdx.x] = total;
  }
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
  const Part part(blockIdx.x, parts, in.length);
  const int64_t cell = part.n, n = cell / in.k, j = cell % in.k;
  const double size = value[n];
  T* to = dgradients + cell * in.length;
  const bool none = j != choice[n] || !in.is_active(n) || size == 0;
  if (none || size != size) {
    const acc fill = none ? acc(0) : static_cast<acc>(size);
    if (part.number == 0 && threadIdx.x == 0) dgap[cell] = fill;
    fill_part(to, part.begin, part.end, narrow<T>(fill));
    return;
  }
  double product = 0;
  for (int64_t p = 0; grad_step && p < parts; ++p) product += products[n * parts + p];
  const double gap = in.gap[cell], distance = fabs(gap) / size;
  const double t = product + (grad_distance ? static_cast<double>(grad_distance[n]) : 0.0);
  if (part.number == 0 && threadIdx.x == 0) dgap[cell] = static_cast<acc>(math::gap_gradient(gap, size, t));
  const T *row = in.row(n, j), *v = grad_step ? grad_step + n * in.length : row;
  int64_t first = 0;
  if constexpr (norm == Norm::MAX) first = first_of(firsts + n * parts, parts);
  const auto gradient = [&](int64_t i, double w, double y) {
    double u;
    if constexpr (norm == Norm::MAX) {
      u = i == first ? math::sign(w) : 0.0;
    } else {
      u = math::slope<norm>(w, size, q);
    }
    if (!grad_step) y = 0;
    return narrow<T>(static_cast<acc>(math::row_gradient<norm>(w, u, y, size, q, distance, t, product)));
  };
  const int word_to = word_of(to);
  const T* const from[2] = {row, v};
  over_part(
      from, part.begin, part.end,
      [&](int64_t i, const Pack<T>(&packs)[2]) {
        Pack<T> pack;
        MK_UNROLL
        for (int e = 0; e < Pack<T>::size; ++e) {
          pack.data[e] = gradient(i + e, widen(packs[0].data[e]), widen(packs[1].data[e]));
        }
        store_pack(to + i, pack, word_to);
      },
      [&](int64_t i) { to[i] = gradient(i, widen(row[i]), widen(v[i])); });
}

// firsts [N, parts]: workspace for the maximum norm, in both directions.
template <class T, class Launch>
void deepfool_step_forward(const Launch& launch, const DeepFool<T>& in, double p, T* step, acc_t<T>* distance,
                           int64_t* choice, acc_t<T>* value, int64_t* firsts) {
  if (in.samples == 0) return;
  const double q = math::dual_exponent(p);
  const int64_t parts = step_parts(in.length);
  const auto blocks = static_cast<unsigned>(in.samples * parts);
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    if constexpr (norm == Norm::MAX) {
      launch(deepfool_choose_kernel<T>, blocks, kNormThreads, 0, in, parts, distance, choice, value, firsts);
    }
    launch(deepfool_step_kernel<norm, T>, blocks, kNormThreads, 0, in, q, parts, step, distance, choice, value, firsts);
  });
}

template <class T, class Launch>
void deepfool_step_backward(const Launch& launch, const DeepFool<T>& in, double p, const int64_t* choice,
                            const acc_t<T>* value, const T* grad_step, const acc_t<T>* grad_distance, double* products,
                            int64_t* firsts, acc_t<T>* dgap, T* dgradients) {
  if (in.samples == 0) return;
  const double q = math::dual_exponent(p);
  const int64_t parts = step_parts(in.length);
  const auto blocks = static_cast<unsigned>(in.samples * parts);
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    if constexpr (norm == Norm::MAX) {
      launch(deepfool_first_kernel<T>, blocks, kNormThreads, 0, in, parts, choice, value, firsts);
    }
    if (grad_step) {
      launch(deepfool_product_kernel<norm, T>, blocks, kNormThreads, 0, in, q, parts, choice, value, grad_step, firsts,
             products);
    }
    launch(deepfool_backward_kernel<norm, T>, static_cast<unsigned>(in.samples * in.k * parts), kNormThreads, 0, in, q,
           parts, choice, value, grad_step, grad_distance, products, firsts, dgap, dgradients);
  });
}

}  // namespace margin_kernels::cuda
