// || w_i - w_y ||_q for gathered rows, and its derivative by rows.
//
// Forward: a warp per pair for rows of up to 8 KiB, a block for longer ones. Each pair reads its two rows; the row of
// the label comes from the cache for all but the first of its k competitors. No difference is stored.
//
// Backward goes by class. `order` lists the uses of the rows sorted by class, equal classes in their order of place:
// use place = pair is the competitor of pair = n k + j, place = N k + pair its label. The list is cut into segments of 32
// uses, a block each for every 128 packs of a row. A class whose uses all lie in one segment is written there; of one
// that goes on, each segment leaves a sum, and a second kernel adds these in their order. The rows of other classes stay
// zero. A use reads the class's own row (from the cache, but for the first use) and the other row of its pair; a thread
// has the two packs of four uses under way.
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

// A pack of a row of which `left` elements are left; behind them zeros.
template <class T>
__device__ __forceinline__ Pack<T> pack_of_row(const T* row, int64_t left) {
  if (left >= Pack<T>::size) return load_pack(row, word_of(row));
  Pack<T> pack;
  MK_UNROLL
  for (int i = 0; i < Pack<T>::size; ++i) pack.data[i] = i < left ? row[i] : narrow<T>(0);
  return pack;
}

// How many entries of each pair's difference attain the maximum: a block per pair.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    row_distance_ties_kernel(RowPairs<T> in, const acc_t<T>* norms, int64_t* ties) {  // [N, k] both
  constexpr int size = Pack<T>::size;
  const int64_t pair = blockIdx.x;
  if (!in.valid(pair)) return;
  const T *a = in.competitor(pair), *b = in.label(pair);
  const acc_t<T> value = norms[pair];
  int64_t count = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * size; i < in.length; i += kNormThreads * size) {
    const int64_t left = in.length - i;
    const Pack<T> x = pack_of_row(a + i, left), y = pack_of_row(b + i, left);
    MK_UNROLL
    for (int j = 0; j < size; ++j) count += j < left && fabs(widen(x.data[j]) - widen(y.data[j])) == value;
  }
  count = sum_block(count);
  if (threadIdx.x == 0) ties[pair] = count;
}

constexpr int kUses = 32, kUsesAtOnce = 4, kUseThreads = 128;
constexpr int kSumsAtOnce = 8;

inline int64_t use_segments(int64_t pairs) { return (2 * pairs + kUses - 1) / kUses; }

// The uses of the rows, sorted, and what a segment leaves.
template <class T>
struct RowUses {
  const int64_t* sorted;  // [2 N k] classes, increasing
  const int64_t* order;   // [2 N k] their places
  int64_t count;
  acc_t<T>* sums;  // [segments, 2, D]: of the class that comes from the segment before, of the one that goes on
  T* drows;        // [C, D], zero

  __device__ bool same(int64_t a, int64_t b) const { return a >= 0 && b < count && sorted[a] == sorted[b]; }
};

// Where the sum of a class goes behind its last use in a segment.
enum class Leave : int { NOTHING, ROW, FROM_BEFORE, GOES_ON };

template <Norm norm, class T>
__global__ void __launch_bounds__(kUseThreads, 1)
    row_distance_backward_kernel(RowPairs<T> in, double q, RowUses<T> uses,
                                 const acc_t<T>* norms,  // [N, k]
                                 const acc_t<T>* grads,  // [N, k]
                                 const int64_t* ties) {  // [N, k], for the maximum only
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  // A use of an invalid pair reads row 0 twice and has the norm 0: its slope is 0.
  __shared__ int64_t own[kUses], other[kUses];  // where the rows begin, in elements
  __shared__ acc values[kUses], weights[kUses];
  __shared__ int64_t tie_counts[kUses];
  __shared__ Leave leave[kUses];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kUses;
  const int count = static_cast<int>(uses.count - begin < kUses ? uses.count - begin : kUses);
  if (threadIdx.x < kUses) {
    const int u = threadIdx.x;
    const int64_t at = begin + u, pairs = in.samples * in.k;
    own[u] = other[u] = 0;
    values[u] = weights[u] = acc(0);
    tie_counts[u] = 1;
    leave[u] = Leave::NOTHING;
    if (u < count) {
      const int64_t place = uses.order[at], pair = place < pairs ? place : place - pairs;
      if (in.valid(pair)) {
        own[u] = (place < pairs ? in.competitor(pair) : in.label(pair)) - in.rows;
        other[u] = (place < pairs ? in.label(pair) : in.competitor(pair)) - in.rows;
        values[u] = norms[pair];
        weights[u] = grads[pair];
        if constexpr (norm == Norm::MAX) tie_counts[u] = ties[pair];
      }
      const bool last = u == count - 1 || !uses.same(at, at + 1);
      if (last && math::is_class(uses.sorted[at], in.classes)) {
        const bool from_before = uses.same(begin - 1, at), goes_on = uses.same(at, at + 1);
        leave[u] = from_before ? Leave::FROM_BEFORE : goes_on ? Leave::GOES_ON : Leave::ROW;
      }
    }
  }
  __syncthreads();

  const int64_t i = (static_cast<int64_t>(blockIdx.y) * kUseThreads + threadIdx.x) * size, left = in.length - i;
  if (left <= 0) return;
  acc sums[size];
  MK_UNROLL
  for (int j = 0; j < size; ++j) sums[j] = acc(0);
  for (int first = 0; first < count; first += kUsesAtOnce) {  // what lies behind `count` adds zeros and leaves nothing
    Pack<T> mine[kUsesAtOnce], theirs[kUsesAtOnce];
    MK_UNROLL
    for (int l = 0; l < kUsesAtOnce; ++l) {
      mine[l] = pack_of_row(in.rows + own[first + l] + i, left);
      theirs[l] = pack_of_row(in.rows + other[first + l] + i, left);
    }
    MK_UNROLL
    for (int l = 0; l < kUsesAtOnce; ++l) {
      const int u = first + l;
      const Slope<norm, T> slope(values[u], weights[u], q, tie_counts[u]);
      MK_UNROLL
      for (int j = 0; j < size; ++j) sums[j] += slope(widen(mine[l].data[j]) - widen(theirs[l].data[j]));
      if (leave[u] == Leave::NOTHING) continue;
      if (leave[u] == Leave::ROW) {
        T* const to = uses.drows + uses.sorted[begin + u] * in.length + i;
        Pack<T> pack;
        MK_UNROLL
        for (int j = 0; j < size; ++j) pack.data[j] = narrow<T>(sums[j]);
        if (left >= size) {
          store_pack(to, pack, word_of(to));
        } else {
          MK_UNROLL
          for (int j = 0; j < size; ++j) {
            if (j < left) to[j] = pack.data[j];
          }
        }
      } else {
        acc* to = uses.sums + 2 * static_cast<int64_t>(blockIdx.x) * in.length + i;
        if (leave[u] == Leave::GOES_ON) to += in.length;
        MK_UNROLL
        for (int j = 0; j < size; ++j) {
          if (j < left) to[j] = sums[j];
        }
      }
      MK_UNROLL
      for (int j = 0; j < size; ++j) sums[j] = acc(0);
    }
  }
}

// A class that goes on behind a segment: a block for the segment in which it begins and 128 elements of its row. Sums of
// several segments are added in float64.
template <class T>
__global__ void __launch_bounds__(kUseThreads)
    row_distance_join_kernel(RowUses<T> uses, int64_t classes, int64_t length, int64_t segments) {
  const int64_t segment = blockIdx.x, begin = segment * kUses, end = begin + kUses;
  if (!uses.same(end - 1, end) || uses.same(begin - 1, end)) return;
  const int64_t c = uses.sorted[end], i = static_cast<int64_t>(blockIdx.y) * kUseThreads + threadIdx.x;
  if (!math::is_class(c, classes) || i >= length) return;
  double total = uses.sums[(2 * segment + 1) * length + i];
  for (int64_t next = segment + 1; next < segments; next += kSumsAtOnce) {
    bool belongs[kSumsAtOnce];
    acc_t<T> sums[kSumsAtOnce];
    MK_UNROLL
    for (int l = 0; l < kSumsAtOnce; ++l) belongs[l] = uses.same(end, (next + l) * kUses);
    MK_UNROLL
    for (int l = 0; l < kSumsAtOnce; ++l) sums[l] = belongs[l] ? uses.sums[2 * (next + l) * length + i] : acc_t<T>(0);
    MK_UNROLL
    for (int l = 0; l < kSumsAtOnce; ++l) total += sums[l];
    if (!belongs[kSumsAtOnce - 1]) break;
  }
  uses.drows[c * length + i] = narrow<T>(static_cast<acc_t<T>>(total));
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
void row_distance_backward(const Launch& launch, const RowPairs<T>& in, double p, const RowUses<T>& uses,
                           const acc_t<T>* norms, const acc_t<T>* grads, int64_t* ties) {
  const int64_t pairs = in.samples * in.k, segments = use_segments(pairs);
  if (pairs == 0 || in.length == 0) return;
  const double q = math::dual_exponent(p);
  const auto blocks = [&](int64_t elements) {
    const int64_t tile = kUseThreads * elements;
    return dim3(static_cast<unsigned>(segments), static_cast<unsigned>((in.length + tile - 1) / tile));
  };
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    if constexpr (norm == Norm::MAX) {
      launch(row_distance_ties_kernel<T>, static_cast<unsigned>(pairs), kNormThreads, 0, in, norms, ties);
    }
    launch(row_distance_backward_kernel<norm, T>, blocks(Pack<T>::size), kUseThreads, 0, in, q, uses, norms, grads,
           ties);
  });
  if (segments > 1) {
    launch(row_distance_join_kernel<T>, blocks(1), kUseThreads, 0, uses, in.classes, in.length, segments);
  }
}

}  // namespace margin_kernels::cuda
