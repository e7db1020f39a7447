// The k strongest classes without the label, their gaps and the cross-entropy, from one read of the logits [N, C].
//
//   C <= 128      4 to 32 lanes per row, four logits each, all in registers
//   C <= 2048     a warp per row
//   C <= 32768    a block of 256 threads per row
//   beyond        a block for every 32768 classes; a second kernel merges their lists and sums in the order of the
//   parts
//
// Rows of more than 128 classes are read in 16-byte words, several of them under way per thread. A warp keeps its k
// best as a sorted list, one entry per lane; a class is looked at more closely only where it beats the last of them,
// which happens about k log(C / k) times per row. The order is that of comparisons of the logits themselves, equal ones
// by class, so ties are exact in every type. The sum of exponentials is taken in the same read, relative to the largest
// logit so far. k > 32 reads the row again for every further 32 competitors, from the cache.
//
// Forward moves N C logits in and N (2 k + 3) numbers out; backward N C in and N C out, both once.
#pragma once

#include <algorithm>

#include "../math/competitors.h"
#include "device.cuh"

namespace margin_kernels::cuda {

constexpr int kShortClasses = 128, kShortLogits = 4;  // logits per lane
constexpr int kWarpClasses = 2048, kPartClasses = 32768;
constexpr int kListed = 32;  // entries of a list: one per lane
// 16-byte words under way per thread: 16 numbers in registers for 2 and 4 bytes each.
template <class T>
constexpr int kRowLoads = sizeof(T) == 4 ? 4 : 2;
constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr int kNoClass = 0x7fffffff;

template <class T>
struct CompetitorsIn {
  using acc = acc_t<T>;
  const T* logits;  // [N, C]
  int64_t row_stride;
  const int64_t* target;  // [N]
  int64_t target_stride;
  int64_t rows;
  int classes, k;
  acc* gap;         // [N, k]
  acc* nll;         // [N]
  int64_t* index;   // [N, k]
  acc* normalizer;  // [N, 2]: max_i z_i, log sum_i exp(z_i - max)

  __device__ const T* row(int64_t n) const { return logits + n * row_stride; }
};

// exp(x) for x <= 0
__device__ __forceinline__ double exp_nonpositive(double x) { return exp(x); }
__device__ __forceinline__ float exp_nonpositive(float x) { return exp2f(x * 1.44269504f); }

template <class acc>
__device__ constexpr acc infinite() {
  return static_cast<acc>(HUGE_VAL);
}

// The label of a row; a target outside the classes counts as class 0 in a row that is NaN.
struct Label {
  int y;
  bool valid;
  __device__ Label(int64_t target, int classes) : y(static_cast<int>(target)), valid(target >= 0 && target < classes) {
    MK_DEVICE_ASSERT(valid);
    if (!valid) y = 0;
  }
};

// sum_i exp(z_i - max), and z * 0 added up: NaN where a logit is not finite.
template <class acc>
struct SumExp {
  acc max = -infinite<acc>(), sum = 0, poison = 0;

  __device__ __forceinline__ void raise(acc other) {
    if (other > max) {
      sum *= exp_nonpositive(max - other);
      max = other;
    }
  }
  __device__ __forceinline__ void merge(SumExp other) {
    raise(other.max);
    if (other.sum != acc(0)) sum += other.sum * exp_nonpositive(other.max - max);
    poison += other.poison;
  }
  // Over the lanes of a row, in a fixed order.
  __device__ __forceinline__ void reduce(int width) {
    raise(reduce_lanes(max, width, [](acc a, acc b) { return a > b ? a : b; }));
    sum = sum_lanes(sum, width);
    poison = sum_lanes(poison, width);
  }
};

// What a row without a NaN gets from its sum; the list is written by whoever holds it.
template <class T>
__device__ __forceinline__ void write_nll(const CompetitorsIn<T>& in, int64_t n, bool usable, SumExp<acc_t<T>> total,
                                          acc_t<T> z_label) {
  using acc = acc_t<T>;
  const acc nan = infinite<acc>() - infinite<acc>();
  const acc log_sum = usable ? static_cast<acc>(log(total.sum)) : nan;
  in.normalizer[2 * n] = usable ? total.max : nan;
  in.normalizer[2 * n + 1] = log_sum;
  in.nll[n] = usable ? math::negative_log_likelihood(z_label, total.max, log_sum) : nan;
}

// Entry j of the list. A row with NaN names the first k classes other than the label, so that a gather stays legal.
template <class T>
__device__ __forceinline__ void write_competitor(const CompetitorsIn<T>& in, int64_t n, int j, bool usable, int y,
                                                 acc_t<T> value, int index, acc_t<T> z_label) {
  using acc = acc_t<T>;
  in.index[n * in.k + j] = usable ? index : (j < y ? j : j + 1);
  in.gap[n * in.k + j] = usable ? value - z_label : infinite<acc>() - infinite<acc>();
}

// ---------------------------------------------------------------------------------------------------- short rows

template <class T>
__global__ void __launch_bounds__(kRowThreads) competitors_short_kernel(CompetitorsIn<T> in, int width) {
  using acc = acc_t<T>;
  const int lane = threadIdx.x % width;
  int64_t n = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / width;
  // Lanes behind the last row repeat it for the shuffles and write nothing.
  const bool beyond = n >= in.rows;
  if (beyond) n = in.rows - 1;
  const T* row = in.row(n);
  const Label label(in.target[n * in.target_stride], in.classes);
  const acc z_label = widen(row[label.y]);

  acc z[kShortLogits];
  SumExp<acc> total;
  MK_UNROLL
  for (int e = 0; e < kShortLogits; ++e) {
    const int i = lane + e * width;
    z[e] = i < in.classes ? widen(row[i]) : -infinite<acc>();
    if (i < in.classes) total.poison += z[e] * acc(0);
    if (z[e] > total.max) total.max = z[e];
  }
  total.max = reduce_lanes(total.max, width, [](acc a, acc b) { return a > b ? a : b; });
  MK_UNROLL
  for (int e = 0; e < kShortLogits; ++e) {
    const int i = lane + e * width;
    if (i < in.classes) total.sum += exp_nonpositive(z[e] - total.max);
    if (i == label.y) z[e] = -infinite<acc>();
  }
  total.sum = sum_lanes(total.sum, width);
  total.poison = sum_lanes(total.poison, width);
  const bool usable = label.valid && total.poison == acc(0);
  if (lane == 0 && !beyond) write_nll(in, n, usable, total, z_label);

  for (int j = 0; j < in.k; ++j) {
    acc best = -infinite<acc>();
    int index = kNoClass;
    MK_UNROLL
    for (int e = 0; e < kShortLogits; ++e) {  // in increasing order of class: an equal one stays behind
      if (z[e] > best) {
        best = z[e];
        index = lane + e * width;
      }
    }
    for (int offset = width / 2; offset > 0; offset /= 2) {
      const acc other = __shfl_xor_sync(kWarp, best, offset);
      const int other_index = __shfl_xor_sync(kWarp, index, offset);
      if (math::comes_before(other, other_index, best, index)) {
        best = other;
        index = other_index;
      }
    }
    MK_UNROLL
    for (int e = 0; e < kShortLogits; ++e) {
      if (index == lane + e * width) z[e] = -infinite<acc>();
    }
    if (lane == j % width && !beyond) write_competitor(in, n, j, usable, label.y, best, index, z_label);
  }
}

// ----------------------------------------------------------------------------------------------------- long rows

// The best classes of a warp so far, in order: lane j holds number j. `last` is number k - 1, the one to beat.
template <class acc>
struct List {
  acc value = -infinite<acc>(), last = -infinite<acc>();
  int index = kNoClass, last_index = kNoClass;
  int k;

  __device__ explicit List(int k_) : k(k_) {}

  __device__ __forceinline__ bool admits(acc v, int i) const { return math::comes_before(v, i, last, last_index); }

  // Called by the whole warp with the same class.
  __device__ __forceinline__ void insert(acc v, int i) {
    const int lane = threadIdx.x % 32;
    const int place = __popc(__ballot_sync(kWarp, math::comes_before(value, index, v, i)));
    const acc value_before = __shfl_up_sync(kWarp, value, 1);
    const int index_before = __shfl_up_sync(kWarp, index, 1);
    if (lane >= place) {
      value = lane == place ? v : value_before;
      index = lane == place ? i : index_before;
    }
    last = __shfl_sync(kWarp, value, k - 1);
    last_index = __shfl_sync(kWarp, index, k - 1);
  }

  // Called by the whole warp, each lane with a class of its own or with none.
  __device__ __forceinline__ void offer(acc v, int i, bool candidate) {
    const int lane = threadIdx.x % 32;
    uint32_t lanes = __ballot_sync(kWarp, candidate && admits(v, i));
    while (lanes != 0) {
      const int source = __ffs(lanes) - 1;
      insert(__shfl_sync(kWarp, v, source), __shfl_sync(kWarp, i, source));
      candidate = candidate && lane != source;
      lanes = __ballot_sync(kWarp, candidate && admits(v, i));
    }
  }
};

// Classes [begin, end) of a row, shared by `threads` threads, whole warps. begin is a multiple of a pack. With `first`
// takes the sum of exponentials too; else only classes that come after (bound, bound_index).
template <bool first, class T>
__device__ __forceinline__ void scan(const T* row, int begin, int end, int thread, int threads, int y, acc_t<T> bound,
                                     int bound_index, List<acc_t<T>>& list, SumExp<acc_t<T>>& total) {
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size, loads = kRowLoads<T>;
  const int word = word_of(row), stride = threads * size;
  for (int base = begin; base < end; base += loads * stride) {  // the same for every lane
    Pack<T> packs[loads];
    MK_UNROLL
    for (int l = 0; l < loads; ++l) {
      const int i = base + l * stride + thread * size;
      if (i + size <= end) packs[l] = load_pack(row + i, word);
    }
    acc z[loads][size], largest[loads];
    MK_UNROLL
    for (int l = 0; l < loads; ++l) {
      const int i = base + l * stride + thread * size;
      const bool whole = i + size <= end;
      largest[l] = -infinite<acc>();
      MK_UNROLL
      for (int j = 0; j < size; ++j) {
        if (whole) {
          z[l][j] = widen(packs[l].data[j]);
          total.poison += z[l][j] * acc(0);
        } else {
          z[l][j] = -infinite<acc>();
          if (i + j < end) {
            z[l][j] = widen(row[i + j]);
            total.poison += z[l][j] * acc(0);
          }
        }
        if (z[l][j] > largest[l]) largest[l] = z[l][j];
      }
    }
    if constexpr (first) {
      acc top = largest[0];
      MK_UNROLL
      for (int l = 1; l < loads; ++l) top = largest[l] > top ? largest[l] : top;
      total.raise(top);
      if (top > -infinite<acc>()) {
        acc sums[loads];
        MK_UNROLL
        for (int l = 0; l < loads; ++l) {
          sums[l] = 0;
          MK_UNROLL
          for (int j = 0; j < size; ++j) sums[l] += exp_nonpositive(z[l][j] - total.max);
        }
        MK_UNROLL
        for (int l = 0; l < loads; ++l) total.sum += sums[l];
      }
    }
    MK_UNROLL
    for (int l = 0; l < loads; ++l) {
      if (!__any_sync(kWarp, largest[l] >= list.last && largest[l] > -infinite<acc>())) continue;
      // Rarely here: read again, one class per lane at a time.
      MK_ROLLED
      for (int j = 0; j < size; ++j) {
        const int i = base + l * stride + thread * size + j;
        const acc v = i < end ? widen(row[i]) : -infinite<acc>();
        const bool after = first || math::comes_before(bound, bound_index, v, i);
        list.offer(v, i, i < end && i != y && after);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) competitors_warp_kernel(CompetitorsIn<T> in) {
  using acc = acc_t<T>;
  const int lane = threadIdx.x % 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (n >= in.rows) return;  // a whole warp; no barrier follows
  const T* row = in.row(n);
  const Label label(in.target[n * in.target_stride], in.classes);
  const acc z_label = widen(row[label.y]);
  SumExp<acc> total;
  List<acc> list(in.k < kListed ? in.k : kListed);
  scan<true>(row, 0, in.classes, lane, 32, label.y, acc(0), 0, list, total);
  total.reduce(32);
  const bool usable = label.valid && total.poison == acc(0);
  if (lane == 0) write_nll(in, n, usable, total, z_label);
  for (int done = 0;;) {
    if (lane < list.k) write_competitor(in, n, done + lane, usable, label.y, list.value, list.index, z_label);
    done += list.k;
    if (done == in.k) return;
    const acc bound = list.last;
    const int bound_index = list.last_index;
    list = List<acc>(in.k - done < kListed ? in.k - done : kListed);
    if (usable) scan<false>(row, 0, in.classes, lane, 32, label.y, bound, bound_index, list, total);
  }
}

// Lists and sums of the parts of long rows.
template <class acc>
struct CompetitorsPart {
  acc* value;         // [N, parts, k]
  int* index;         // [N, parts, k]
  SumExp<acc>* sums;  // [N, parts]
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2)
    competitors_block_kernel(CompetitorsIn<T> in, int parts, int part_length, CompetitorsPart<acc_t<T>> to) {
  using acc = acc_t<T>;
  __shared__ acc values[kRowWarps][kListed];
  __shared__ int indices[kRowWarps][kListed];
  __shared__ acc maxima[kRowWarps], sums[kRowWarps], poisons[kRowWarps], bound;
  __shared__ int bound_index;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int begin = part * part_length;
  const int end = in.classes - begin < part_length ? in.classes : begin + part_length;
  const T* row = in.row(n);
  const Label label(in.target[n * in.target_stride], in.classes);
  const acc z_label = widen(row[label.y]);

  SumExp<acc> total;
  bool usable = true;  // only warp 0 knows better
  for (int done = 0; done < in.k;) {
    const int count = in.k - done < kListed ? in.k - done : kListed;
    List<acc> list(count);
    if (done == 0) {
      scan<true>(row, begin, end, static_cast<int>(threadIdx.x), kRowThreads, label.y, acc(0), 0, list, total);
      total.reduce(32);
      if (lane == 0) {
        maxima[warp] = total.max;
        sums[warp] = total.sum;
        poisons[warp] = total.poison;
      }
    } else {
      scan<false>(row, begin, end, static_cast<int>(threadIdx.x), kRowThreads, label.y, bound, bound_index, list,
                  total);
    }
    values[warp][lane] = list.value;
    indices[warp][lane] = list.index;
    __syncthreads();
    if (warp == 0) {
      for (int w = 1; w < kRowWarps; ++w) {
        for (int j = 0; j < count && list.admits(values[w][j], indices[w][j]); ++j) {
          list.insert(values[w][j], indices[w][j]);
        }
      }
      if (done == 0) {
        total = SumExp<acc>();
        if (lane < kRowWarps) {
          total.max = maxima[lane];
          total.sum = sums[lane];
          total.poison = poisons[lane];
        }
        total.reduce(32);
        usable = label.valid && total.poison == acc(0);
      }
      if (parts == 1) {
        if (done == 0 && lane == 0) write_nll(in, n, usable, total, z_label);
        if (lane < count) write_competitor(in, n, done + lane, usable, label.y, list.value, list.index, z_label);
      } else {  // k <= kListed here
        const int64_t place = n * parts + part;
        if (lane == 0) to.sums[place] = total;
        if (lane < count) {
          to.value[place * in.k + lane] = list.value;
          to.index[place * in.k + lane] = list.index;
        }
      }
      if (lane == 0) {
        bound = list.last;
        bound_index = list.last_index;
      }
    }
    done += count;
    __syncthreads();
  }
}

// The second stage of rows with several parts: a warp per row.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    competitors_merge_kernel(CompetitorsIn<T> in, int parts, CompetitorsPart<acc_t<T>> from) {
  using acc = acc_t<T>;
  const int lane = threadIdx.x % 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (n >= in.rows) return;
  const Label label(in.target[n * in.target_stride], in.classes);
  const acc z_label = widen(in.row(n)[label.y]);
  SumExp<acc> total;
  List<acc> list(in.k);
  for (int part = 0; part < parts; ++part) {
    const int64_t place = (n * parts + part) * in.k;
    for (int j = 0; j < in.k && list.admits(from.value[place + j], from.index[place + j]); ++j) {
      list.insert(from.value[place + j], from.index[place + j]);
    }
  }
  for (int part = lane; part < parts; part += 32) total.merge(from.sums[n * parts + part]);
  total.reduce(32);
  const bool usable = label.valid && total.poison == acc(0);
  if (lane == 0) write_nll(in, n, usable, total, z_label);
  if (lane < in.k) write_competitor(in, n, lane, usable, label.y, list.value, list.index, z_label);
}

// ------------------------------------------------------------------------------------------------------ backward

template <class T>
struct CompetitorsBackwardIn {
  using acc = acc_t<T>;
  const T* logits;  // [N, C]
  int64_t row_stride;
  const int64_t* target;  // [N]
  int64_t target_stride;
  int64_t rows;
  int classes, k;
  const int64_t* index;   // [N, k]
  const acc* normalizer;  // [N, 2]
  const acc* grad_gap;    // [N, k] or null
  int64_t gap_strides[2];
  const acc* grad_nll;  // [N] or null
  int64_t nll_stride;
  T* dlogits;  // [N, C] contiguous
};

// dz = grad_nll softmax, and the entries of label and competitors. One row, or [begin, end) of it.
template <class T>
struct RowGradient {
  using acc = acc_t<T>;
  const CompetitorsBackwardIn<T>& in;
  int64_t n;
  const T* z;
  T* dz;
  acc max, log_sum, grad_nll, factor;

  __device__ RowGradient(const CompetitorsBackwardIn<T>& in_, int64_t n_)
      : in(in_),
        n(n_),
        z(in_.logits + n_ * in_.row_stride),
        dz(in_.dlogits + n_ * in_.classes),
        max(in_.normalizer[2 * n_]),
        log_sum(in_.normalizer[2 * n_ + 1]),
        grad_nll(in_.grad_nll ? in_.grad_nll[n_ * in_.nll_stride] : acc(0)),
        // exp(z - max - log_sum) = exp(z - max) / sum: the argument stays <= 0 without rounding
        factor(grad_nll * exp(-log_sum)) {}

  __device__ bool is_nan() const { return log_sum != log_sum; }
  // Without a gradient of nll the row is zero, and logits are not read; a row with NaN is NaN.
  __device__ bool is_constant() const { return is_nan() || grad_nll == acc(0); }
  __device__ acc constant() const { return is_nan() ? log_sum : acc(0); }
  __device__ __forceinline__ T entry(T logit) const {
    return narrow<T>(static_cast<acc>(exp(widen(logit) - max)) * factor);
  }

  // Called when the row is written, by `width` lanes of one warp: label and competitors again, from float32.
  __device__ void special_entries(int begin, int end, int lane, int width) const {
    acc total = 0;
    for (int j = lane; j < in.k && in.grad_gap; j += width) {
      const acc grad_gap = in.grad_gap[n * in.gap_strides[0] + j * in.gap_strides[1]];
      total += grad_gap;
      const int64_t i = in.index[n * in.k + j];
      if (is_nan() || i < begin || i >= end) continue;
      const acc p = grad_nll == acc(0) ? acc(0) : math::softmax<acc>(widen(z[i]), max, log_sum);
      dz[i] = narrow<T>(math::competitor_gradient(p, grad_nll, grad_gap));
    }
    total = sum_lanes(total, width);
    const int64_t y = in.target[n * in.target_stride];
    if (lane != 0 || is_nan() || y < begin || y >= end) return;
    const acc p = grad_nll == acc(0) ? acc(0) : math::softmax<acc>(widen(z[y]), max, log_sum);
    dz[y] = narrow<T>(math::label_gradient(p, grad_nll, total));
  }
};

// C <= 128: `width` lanes per row, neighbouring lanes on neighbouring logits.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    competitors_backward_short_kernel(CompetitorsBackwardIn<T> in, int width) {
  const int lane = threadIdx.x % width;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / width;
  const bool beyond = n >= in.rows;
  const RowGradient<T> row(in, beyond ? in.rows - 1 : n);
  if (!beyond) {
    for (int i = lane; i < in.classes; i += width) {
      row.dz[i] = row.is_constant() ? narrow<T>(row.constant()) : row.entry(row.z[i]);
    }
  }
  __syncwarp();
  // Lanes behind the last row stay for the shuffles, with an empty range of classes.
  row.special_entries(0, beyond ? 0 : in.classes, lane, width);
}

// `threads` = 32: a warp per row; 256: a block for every part of a row.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    competitors_backward_kernel(CompetitorsBackwardIn<T> in, int threads, int parts, int part_length) {
  constexpr int size = Pack<T>::size;
  const int thread = threadIdx.x % threads, per_block = kRowThreads / threads;
  const int64_t n = static_cast<int64_t>(blockIdx.x / parts) * per_block + threadIdx.x / threads;
  if (n >= in.rows) return;  // a whole warp, or none
  const int begin = static_cast<int>(blockIdx.x % parts) * part_length;
  const int end = in.classes - begin < part_length ? in.classes : begin + part_length;
  const RowGradient<T> row(in, n);
  const int word = word_of(row.z), word_to = word_of(row.dz), stride = threads * size;
  if (row.is_constant()) {
    Pack<T> pack;
    MK_UNROLL
    for (int j = 0; j < size; ++j) pack.data[j] = narrow<T>(row.constant());
    int i = begin + thread * size;
    for (; i + size <= end; i += stride) store_pack(row.dz + i, pack, word_to);
    for (; i < end; ++i) row.dz[i] = pack.data[0];
  } else {
    const auto store = [&](int i, Pack<T> pack) {
      MK_UNROLL
      for (int j = 0; j < size; ++j) pack.data[j] = row.entry(pack.data[j]);
      store_pack(row.dz + i, pack, word_to);
    };
    int i = begin + thread * size;
    for (; i + stride + size <= end; i += 2 * stride) {
      const Pack<T> a = load_pack(row.z + i, word), b = load_pack(row.z + i + stride, word);
      store(i, a);
      store(i + stride, b);
    }
    for (; i + size <= end; i += stride) store(i, load_pack(row.z + i, word));
    for (; i < end; ++i) row.dz[i] = row.entry(row.z[i]);
  }
  if (threads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (thread < 32) row.special_entries(begin, end, thread, 32);
}

// ------------------------------------------------------------------------------------------------------ launches

// Lanes per row for C <= 128; depends on C only, and so does the order of the sums.
inline int short_width(int classes) {
  int width = 4;
  while (width * kShortLogits < classes) width *= 2;
  return width;
}

// Blocks per row, for rows that take a block. More than 32 competitors need several reads: one block then.
inline int forward_parts(int classes, int k) { return k > kListed ? 1 : (classes + kPartClasses - 1) / kPartClasses; }

// Equal parts, multiples of any pack.
inline int length_of_part(int classes, int parts) { return ((classes + parts - 1) / parts + 15) / 16 * 16; }

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Entries of the workspace of CompetitorsPart: (lists, sums)
inline std::pair<int64_t, int64_t> competitors_workspace(int64_t rows, int classes, int k) {
  const int parts = classes <= kWarpClasses ? 1 : forward_parts(classes, k);
  return parts == 1 ? std::pair<int64_t, int64_t>(0, 0) : std::pair<int64_t, int64_t>(rows * parts * k, rows * parts);
}

template <class T, class Launch>
void competitors_forward(const Launch& launch, const CompetitorsIn<T>& in, const CompetitorsPart<acc_t<T>>& workspace) {
  if (in.rows == 0) return;
  if (in.classes <= kShortClasses) {
    const int width = short_width(in.classes);
    launch(competitors_short_kernel<T>, blocks_for(in.rows, kRowThreads / width), kRowThreads, 0, in, width);
  } else if (in.classes <= kWarpClasses) {
    launch(competitors_warp_kernel<T>, blocks_for(in.rows, kRowWarps), kRowThreads, 0, in);
  } else {
    const int parts = forward_parts(in.classes, in.k);
    launch(competitors_block_kernel<T>, static_cast<unsigned>(in.rows * parts), kRowThreads, 0, in, parts,
           length_of_part(in.classes, parts), workspace);
    if (parts > 1) {
      launch(competitors_merge_kernel<T>, blocks_for(in.rows, kRowWarps), kRowThreads, 0, in, parts, workspace);
    }
  }
}

template <class T, class Launch>
void competitors_backward(const Launch& launch, const CompetitorsBackwardIn<T>& in) {
  if (in.rows == 0) return;
  if (in.classes <= kShortClasses) {
    const int width = short_width(in.classes);
    launch(competitors_backward_short_kernel<T>, blocks_for(in.rows, kRowThreads / width), kRowThreads, 0, in, width);
  } else if (in.classes <= kWarpClasses) {
    launch(competitors_backward_kernel<T>, blocks_for(in.rows, kRowWarps), kRowThreads, 0, in, 32, 1, in.classes);
  } else {
    const int parts = (in.classes + kPartClasses - 1) / kPartClasses;
    launch(competitors_backward_kernel<T>, static_cast<unsigned>(in.rows * parts), kRowThreads, 0, in, kRowThreads,
           parts, length_of_part(in.classes, parts));
  }
}

}  // namespace margin_kernels::cuda
