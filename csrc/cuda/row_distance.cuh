// || w_i - w_y ||_q for gathered rows, and its derivative by rows.
//
// Forward: a warp per pair for rows of up to 8 KiB, a block for longer ones. Each pair reads its two rows; the row of
// the label comes from the cache for all but the first of its k competitors. No difference is stored.
//
// Backward goes by class. `order` lists the uses of the rows sorted by class, equal classes in their order of place:
// use place = n k + j is the competitor of pair (n, j), place = N k + n the label of sample n. One block per class that
// is used adds the slopes of its uses in that order and writes its row once; the rows of other classes stay zero.
#pragma once

#include "../math/row_distance.h"
#include "dual_norm.cuh"

namespace margin_kernels::cuda {

template <class T>
struct RowPairs {
  const T* rows;  // [C, D]
  int64_t stride, classes, length;
  const int64_t* index;   // [N, k]
  const int64_t* target;  // [N]
  int64_t samples, k;

  __device__ bool valid(int64_t pair) const {
    return math::is_class(index[pair], classes) && math::is_class(target[pair / k], classes);
  }
  __device__ const T* competitor(int64_t pair) const { return rows + index[pair] * stride; }
  __device__ const T* label(int64_t pair) const { return rows + target[pair / k] * stride; }
};

constexpr int64_t kWarpPairBytes = 8192;
constexpr int kPairLoads = 2;

// The differences of two packs, in the type of the sums: 16 bytes of half precision fill two packs of float32.
template <class T>
struct Difference {
  using acc = acc_t<T>;
  static constexpr int packs = Pack<T>::size / Pack<acc>::size;
  Pack<acc> values[packs];

  __device__ __forceinline__ Difference(const Pack<T>& a, const Pack<T>& b) {
    MK_UNROLL
    for (int i = 0; i < Pack<T>::size; ++i) {
      values[i / Pack<acc>::size].data[i % Pack<acc>::size] = widen(a.data[i]) - widen(b.data[i]);
    }
  }
};

// Elements [0, length) of a - b, shared by `threads` threads.
template <Norm norm, class T>
__device__ __forceinline__ Partial difference_total(const T* a, const T* b, int64_t length, int thread, int threads,
                                                    double q) {
  constexpr int size = Pack<T>::size;
  const int word_a = word_of(a), word_b = word_of(b);
  const int64_t stride = static_cast<int64_t>(threads) * size;
  Total<norm, acc_t<T>> total(q);
  int64_t i = static_cast<int64_t>(thread) * size;
  for (; i + (kPairLoads - 1) * stride + size <= length; i += kPairLoads * stride) {
    Pack<T> x[kPairLoads], y[kPairLoads];
    MK_UNROLL
    for (int l = 0; l < kPairLoads; ++l) {
      x[l] = load_pack(a + i + l * stride, word_a);
      y[l] = load_pack(b + i + l * stride, word_b);
    }
    MK_UNROLL
    for (int l = 0; l < kPairLoads; ++l) total.add(Difference<T>(x[l], y[l]).values);
  }
  for (; i + size <= length; i += stride) {
    total.add(Difference<T>(load_pack(a + i, word_a), load_pack(b + i, word_b)).values);
  }
  if (i < length) {
    Pack<T> x, y;
    MK_UNROLL
    for (int j = 0; j < size; ++j) {
      x.data[j] = i + j < length ? a[i + j] : narrow<T>(0);
      y.data[j] = i + j < length ? b[i + j] : narrow<T>(0);
    }
    total.add(Difference<T>(x, y).values);
  }
  return total.partial();
}

// A warp (threads = 32) or a block (threads = kNormThreads) per pair. A pair with an invalid class is NaN.
template <Norm norm, class T, int threads>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<norm, acc_t<T>> == 4 ? 3 : 1)
    row_distance_kernel(RowPairs<T> in, double q, acc_t<T>* norms) {  // [N, k]
  using acc = acc_t<T>;
  const int thread = threadIdx.x % threads;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kNormThreads / threads) + threadIdx.x / threads;
  if (pair >= in.samples * in.k) return;  // a whole warp, or the whole block
  if (!in.valid(pair)) {
    MK_DEVICE_ASSERT(false && "index and target must be in [0, C)");
    if (thread == 0) norms[pair] = static_cast<acc>(NAN);
    return;
  }
  Partial total = difference_total<norm>(in.competitor(pair), in.label(pair), in.length, thread, threads, q);
  if constexpr (threads == 32) {
    total = reduce_warp<norm, acc>(total, q);
  } else {
    total = reduce_block<norm, acc>(total, q);
  }
  if (thread == 0) norms[pair] = static_cast<acc>(norm_of_total<norm>(total, q));
}

// How many entries of each pair's difference attain the maximum: a block per pair.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    row_distance_ties_kernel(RowPairs<T> in, const acc_t<T>* norms, int64_t* ties) {  // [N, k] both
  const int64_t pair = blockIdx.x;
  if (!in.valid(pair)) return;
  const T *a = in.competitor(pair), *b = in.label(pair);
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < in.length; i += kNormThreads)
    count += fabs(widen(a[i]) - widen(b[i])) == norms[pair];
  count = sum_block(count);
  if (threadIdx.x == 0) ties[pair] = count;
}

template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, 1)
    row_distance_backward_kernel(RowPairs<T> in, double q,
                                 const int64_t* sorted,  // [N k + N] classes, increasing
                                 const int64_t* order,   // [N k + N] their places
                                 const acc_t<T>* norms,  // [N, k]
                                 const acc_t<T>* grads,  // [N, k]
                                 const int64_t* ties,    // [N, k], for the maximum only
                                 T* drows) {             // [C, D], zero
  const int64_t pairs = in.samples * in.k, uses = pairs + in.samples, first = blockIdx.x;
  const int64_t c = sorted[first];
  if (!math::is_class(c, in.classes) || (first > 0 && sorted[first - 1] == c)) return;
  for (int64_t i = threadIdx.x; i < in.length; i += kNormThreads) {
    const double mine = widen(in.rows[c * in.stride + i]);
    double total = 0;
    for (int64_t use = first; use < uses && sorted[use] == c; ++use) {
      const int64_t place = order[use];
      // As the label it meets all k competitors of its sample, as a competitor the one label.
      const bool is_label = place >= pairs;
      const int64_t begin = is_label ? (place - pairs) * in.k : place, end = is_label ? begin + in.k : begin + 1;
      for (int64_t pair = begin; pair < end; ++pair) {
        if (!in.valid(pair)) continue;
        const double other = widen((is_label ? in.competitor(pair) : in.label(pair))[i]);
        const double value = norms[pair], grad = grads[pair];
        double slope;
        if constexpr (norm == Norm::MAX) {
          const double difference = static_cast<double>(static_cast<acc_t<T>>(mine) - static_cast<acc_t<T>>(other));
          const double share = 1 / static_cast<double>(ties[pair]);
          slope =
              value == 0 ? 0 : (value != value ? value : (fabs(difference) == value ? copysign(share, difference) : 0));
        } else {
          slope = math::pair_slope<norm>(mine, other, value, q);
        }
        total += slope * grad;
      }
    }
    drows[c * in.length + i] = narrow<T>(static_cast<acc_t<T>>(total));
  }
}

inline unsigned row_distance_blocks(int64_t pairs, bool warps) {
  return static_cast<unsigned>(warps ? (pairs + kNormWarps - 1) / kNormWarps : pairs);
}

template <class T, class Launch>
void row_distance_forward(const Launch& launch, const RowPairs<T>& in, double p, acc_t<T>* norms) {
  const int64_t pairs = in.samples * in.k;
  if (pairs == 0) return;
  const double q = math::dual_exponent(p);
  const bool warps = in.length * static_cast<int64_t>(sizeof(T)) <= kWarpPairBytes;
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    launch(warps ? row_distance_kernel<norm, T, 32> : row_distance_kernel<norm, T, kNormThreads>,
           row_distance_blocks(pairs, warps), kNormThreads, 0, in, q, norms);
  });
}

template <class T, class Launch>
void row_distance_backward(const Launch& launch, const RowPairs<T>& in, double p, const int64_t* sorted,
                           const int64_t* order, const acc_t<T>* norms, const acc_t<T>* grads, int64_t* ties,
                           T* drows) {
  const int64_t pairs = in.samples * in.k;
  if (pairs == 0 || in.length == 0) return;
  const double q = math::dual_exponent(p);
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    if constexpr (norm == Norm::MAX) {
      launch(row_distance_ties_kernel<T>, static_cast<unsigned>(pairs), kNormThreads, 0, in, norms, ties);
    }
    launch(row_distance_backward_kernel<norm, T>, static_cast<unsigned>(pairs + in.samples), kNormThreads, 0, in, q,
           sorted, order, norms, grads, ties, drows);
  });
}

}  // namespace margin_kernels::cuda
