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
// by class, so ties are exact in every type. The sum of exponentials over the competitors is taken in the same read,
// relative to the largest competitor so far. k > 32 reads the row again for every further 32 competitors, from the
// cache; so does a row with fewer than k finite competitors, to name its masked classes.
//
// Forward moves N C logits in and N (2 k + 5) numbers out; backward N C in and N C out, both once.
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
  int64_t target_stride, ignore_index;
  int64_t rows;
  int classes, k;
  int64_t* index;   // [N, k]
  acc* gap;         // [N, k]
  acc* nll;         // [N]
  acc* phi;         // [N]
  acc* uniform;     // [N] or null
  acc* normalizer;  // [N, 3]: R, S of math/competitors.h and, with uniform, the number of finite classes

  __device__ const T* row(int64_t n) const { return logits + n * row_stride; }
};

// exp(x) for x <= 0
__device__ __forceinline__ double exp_nonpositive(double x) { return exp(x); }
__device__ __forceinline__ float exp_nonpositive(float x) { return exp2f(x * 1.44269504f); }

template <class acc>
__device__ constexpr acc infinite() {
  return static_cast<acc>(HUGE_VAL);
}

// The label of a row. A target outside the classes counts as class 0, in a row that is NaN or ignored.
struct Label {
  int y;
  bool valid, ignored;
  __device__ Label(int64_t target, int classes, int64_t ignore_index)
      : y(static_cast<int>(target)), valid(target >= 0 && target < classes), ignored(target == ignore_index) {
    MK_DEVICE_ASSERT(valid || ignored);
    if (!valid) y = 0;
  }
};

// Over the competitors of a row: sum_i exp(z_i - max), how many are finite, and sum of (max - z_i) over the finite
// ones. poison > 0 where a logit, the label's too, is NaN or +inf.
template <class acc>
struct SumExp {
  acc max = -infinite<acc>(), sum = 0, count = 0, deficit = 0, poison = 0;

  __device__ __forceinline__ void raise(acc other) {
    if (other > max) {
      sum *= exp_nonpositive(max - other);
      if (count > acc(0)) deficit += count * (other - max);
      max = other;
    }
  }
  __device__ __forceinline__ void merge(SumExp other) {
    raise(other.max);
    if (other.count != acc(0)) {
      sum += other.sum * exp_nonpositive(other.max - max);
      deficit += other.deficit + other.count * (max - other.max);
      count += other.count;
    }
    poison += other.poison;
  }
  // Adds a competitor whose logit is not above max.
  __device__ __forceinline__ void add(acc z, bool with_deficit) {
    if (z > -infinite<acc>()) {
      count += acc(1);
      if (with_deficit) deficit += max - z;
    }
  }
  // Over the lanes of a row, in a fixed order.
  __device__ __forceinline__ void reduce(int width) {
    raise(reduce_lanes(max, width, [](acc a, acc b) { return a > b ? a : b; }));
    sum = sum_lanes(sum, width);
    count = sum_lanes(count, width);
    deficit = sum_lanes(deficit, width);
    poison = sum_lanes(poison, width);
  }
};

// Without NaN, +inf and an invalid target; some logit must be finite.
template <class acc>
__device__ __forceinline__ bool is_usable(const Label& label, const SumExp<acc>& total, acc z_label) {
  return label.valid && total.poison == acc(0) && (total.count > acc(0) || !math::is_masked(z_label));
}

// The losses of row n; the list is written by whoever holds it.
template <class T>
__device__ __forceinline__ void write_losses(const CompetitorsIn<T>& in, int64_t n, const Label& label, bool usable,
                                             const SumExp<acc_t<T>>& total, acc_t<T> z_label) {
  using acc = acc_t<T>;
  // What a row has that is ignored, and what one with NaN has.
  const acc constant = label.ignored ? acc(0) : infinite<acc>() - infinite<acc>();
  math::RowLosses<acc> losses{constant, constant};
  acc uniform = constant, max = constant, sum = constant, count = constant;
  if (usable && !label.ignored) {
    max = total.max;
    sum = total.count > acc(0) ? total.sum : acc(0);
    losses = math::row_losses(z_label, max, sum);
    uniform = in.uniform ? math::uniform_loss(z_label, max, sum, total.deficit, total.count) : acc(0);
    count = in.uniform ? total.count + (math::is_masked(z_label) ? acc(0) : acc(1)) : acc(0);
  }
  in.normalizer[3 * n] = max;
  in.normalizer[3 * n + 1] = sum;
  in.normalizer[3 * n + 2] = count;
  in.nll[n] = losses.nll;
  in.phi[n] = losses.phi;
  if (in.uniform) in.uniform[n] = uniform;
}

// Entry j of the list. An ignored row names the first k classes, one with NaN the first k other than the label, so that
// a gather stays legal. Behind the finite competitors come the masked ones, in their order.
template <class T>
__device__ __forceinline__ void write_competitor(const CompetitorsIn<T>& in, int64_t n, int j, const Label& label,
                                                 bool usable, acc_t<T> finite, acc_t<T> value, int index,
                                                 acc_t<T> z_label) {
  using acc = acc_t<T>;
  acc gap = math::gap(value, z_label);
  if (label.ignored) {
    index = j;
    gap = 0;
  } else if (!usable) {
    index = j < label.y ? j : j + 1;
    gap = infinite<acc>() - infinite<acc>();
  } else if (index == kNoClass) {
    int behind = j - static_cast<int>(finite);
    index = 0;
    for (;; ++index) {
      if (index == label.y || !math::is_masked<acc>(widen(in.row(n)[index]))) continue;
      if (behind-- == 0) break;
    }
  }
  in.index[n * in.k + j] = index;
  in.gap[n * in.k + j] = gap;
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
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
  const acc z_label = widen(row[label.y]);

  acc z[kShortLogits];
  SumExp<acc> total;
  MK_UNROLL
  for (int e = 0; e < kShortLogits; ++e) {
    const int i = lane + e * width;
    z[e] = i < in.classes ? widen(row[i]) : -infinite<acc>();
    if (!(z[e] < infinite<acc>())) total.poison += acc(1);
    if (i == label.y) z[e] = -infinite<acc>();
    if (z[e] > total.max) total.max = z[e];
  }
  total.max = reduce_lanes(total.max, width, [](acc a, acc b) { return a > b ? a : b; });
  // Competitors that are all masked have the sum 0: nothing is subtracted from -inf.
  const acc max = total.max > -infinite<acc>() ? total.max : acc(0);
  MK_UNROLL
  for (int e = 0; e < kShortLogits; ++e) {
    total.sum += exp_nonpositive(z[e] - max);
    total.add(z[e], in.uniform != nullptr);
  }
  total.sum = sum_lanes(total.sum, width);
  total.count = sum_lanes(total.count, width);
  total.deficit = sum_lanes(total.deficit, width);
  total.poison = sum_lanes(total.poison, width);
  const bool usable = is_usable(label, total, z_label);
  if (lane == 0 && !beyond) write_losses(in, n, label, usable, total, z_label);

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
    if (lane == j % width && !beyond) {
      write_competitor(in, n, j, label, usable, total.count, best, index, z_label);
    }
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
// takes the sums of SumExp too, the deficit if it is asked for; else only classes that come after (bound, bound_index).
template <bool first, class T>
__device__ __forceinline__ void scan(const T* row, int begin, int end, int thread, int threads, int y, acc_t<T> bound,
                                     int bound_index, List<acc_t<T>>& list, SumExp<acc_t<T>>& total,
                                     bool with_deficit) {
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
        } else {
          z[l][j] = i + j < end ? widen(row[i + j]) : -infinite<acc>();
        }
        if (!(z[l][j] < infinite<acc>())) total.poison += acc(1);
        if (i + j == y) z[l][j] = -infinite<acc>();
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
          for (int j = 0; j < size; ++j) {
            sums[l] += exp_nonpositive(z[l][j] - total.max);
            total.add(z[l][j], with_deficit);
          }
        }
        MK_UNROLL
        for (int l = 0; l < loads; ++l) total.sum += sums[l];
      }
    }
    MK_UNROLL
    for (int l = 0; l < loads; ++l) {
      if (list.k == 0 || !__any_sync(kWarp, largest[l] >= list.last && largest[l] > -infinite<acc>())) continue;
      // Rarely here: read again, one class per lane at a time.
      MK_ROLLED
      for (int j = 0; j < size; ++j) {
        const int i = base + l * stride + thread * size + j;
        const acc v = i < end ? widen(row[i]) : -infinite<acc>();
        const bool after = first || math::comes_before(bound, bound_index, v, i);
        list.offer(v, i, i < end && i != y && after && v > -infinite<acc>());
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
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
  const acc z_label = widen(row[label.y]);
  SumExp<acc> total;
  List<acc> list(in.k < kListed ? in.k : kListed);
  scan<true>(row, 0, in.classes, lane, 32, label.y, acc(0), 0, list, total, in.uniform != nullptr);
  total.reduce(32);
  const acc finite = total.count;
  const bool usable = is_usable(label, total, z_label);
  if (lane == 0) write_losses(in, n, label, usable, total, z_label);
  for (int done = 0;;) {
    if (lane < list.k) {
      write_competitor(in, n, done + lane, label, usable, finite, list.value, list.index, z_label);
    }
    done += list.k;
    if (done == in.k) return;
    const acc bound = list.last;
    const int bound_index = list.last_index;
    list = List<acc>(in.k - done < kListed ? in.k - done : kListed);
    if (usable) scan<false>(row, 0, in.classes, lane, 32, label.y, bound, bound_index, list, total, false);
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
  __shared__ acc maxima[kRowWarps], sums[kRowWarps], counts[kRowWarps], deficits[kRowWarps], poisons[kRowWarps];
  __shared__ acc bound;
  __shared__ int bound_index;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int begin = part * part_length;
  const int end = in.classes - begin < part_length ? in.classes : begin + part_length;
  const T* row = in.row(n);
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
  const acc z_label = widen(row[label.y]);

  SumExp<acc> total;
  acc finite = 0;
  bool usable = true;  // only warp 0 knows better
  int done = 0;
  do {  // once for k = 0 too
    const int count = in.k - done < kListed ? in.k - done : kListed;
    List<acc> list(count);
    if (done == 0) {
      scan<true>(row, begin, end, static_cast<int>(threadIdx.x), kRowThreads, label.y, acc(0), 0, list, total,
                 in.uniform != nullptr);
      total.reduce(32);
      if (lane == 0) {
        maxima[warp] = total.max;
        sums[warp] = total.sum;
        counts[warp] = total.count;
        deficits[warp] = total.deficit;
        poisons[warp] = total.poison;
      }
    } else {
      scan<false>(row, begin, end, static_cast<int>(threadIdx.x), kRowThreads, label.y, bound, bound_index, list, total,
                  false);
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
          total.count = counts[lane];
          total.deficit = deficits[lane];
          total.poison = poisons[lane];
        }
        total.reduce(32);
        finite = total.count;
        usable = is_usable(label, total, z_label);
      }
      if (parts == 1) {
        if (done == 0 && lane == 0) write_losses(in, n, label, usable, total, z_label);
        if (lane < count) {
          write_competitor(in, n, done + lane, label, usable, finite, list.value, list.index, z_label);
        }
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
  } while (done < in.k);
}

// The second stage of rows with several parts: a warp per row.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    competitors_merge_kernel(CompetitorsIn<T> in, int parts, CompetitorsPart<acc_t<T>> from) {
  using acc = acc_t<T>;
  const int lane = threadIdx.x % 32;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (n >= in.rows) return;
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
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
  const bool usable = is_usable(label, total, z_label);
  if (lane == 0) write_losses(in, n, label, usable, total, z_label);
  if (lane < in.k) write_competitor(in, n, lane, label, usable, total.count, list.value, list.index, z_label);
}

// ------------------------------------------------------------------------------------------------------ backward

// A gradient [N]: null where nothing depends on the output.
template <class acc>
struct PerSample {
  const acc* data;
  int64_t stride;
  __device__ acc operator[](int64_t n) const { return data ? data[n * stride] : acc(0); }
};

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
  const acc* normalizer;  // [N, 3]
  const acc* grad_gap;    // [N, k] or null
  int64_t gap_strides[2];
  PerSample<acc> grad_nll, grad_phi, grad_uniform;  // [N]
  T* dlogits;                                       // [N, C] contiguous
};

// The competitors' entries, and those of label and competitors. One row, or [begin, end) of it.
template <class T>
struct RowGradient {
  using acc = acc_t<T>;
  const CompetitorsBackwardIn<T>& in;
  int64_t n;
  const T* z;
  T* dz;
  acc max, sum, z_label;
  int64_t y;
  math::RowWeights<acc> weights;
  acc factor;

  // sum = 0: a row that is ignored, or without a competitor, has no gradient; its target may be no class. NaN: all NaN.
  __device__ RowGradient(const CompetitorsBackwardIn<T>& in_, int64_t n_)
      : in(in_),
        n(n_),
        z(in_.logits + n_ * in_.row_stride),
        dz(in_.dlogits + n_ * in_.classes),
        max(in_.normalizer[3 * n_]),
        sum(in_.normalizer[3 * n_ + 1]),
        z_label(0),
        y(in_.target[n_ * in_.target_stride]),
        weights(0, 0, 0, 0, 0, 0, 0),
        factor(0) {
    if (!(sum > acc(0))) return;
    z_label = widen(z[y]);
    weights = math::RowWeights<acc>(in_.grad_nll[n_], in_.grad_phi[n_], in_.grad_uniform[n_], z_label, max, sum,
                                    in_.normalizer[3 * n_ + 2]);
    factor = weights.of_others / sum;
  }

  __device__ bool is_nan() const { return sum != sum; }
  __device__ bool is_constant() const { return !(sum > acc(0)) || weights.is_zero(); }
  __device__ acc constant() const { return is_nan() ? sum : acc(0); }
  __device__ __forceinline__ T entry(T logit) const {
    const acc v = widen(logit);
    acc share = weights.share;
    if (share != acc(0) && math::is_masked(v)) share = 0;
    // The label's own argument may be positive; its entry is written again.
    return narrow<T>(static_cast<acc>(exp(v < max ? v - max : acc(0))) * factor - share);
  }

  // Called when the row is written, by `width` lanes of one warp: label and competitors again, from float32.
  __device__ void special_entries(int begin, int end, int lane, int width) const {
    const bool silent = !(sum > acc(0)), label_is_masked = math::is_masked(z_label);
    acc total = 0;
    for (int j = lane; j < in.k && in.grad_gap && !silent && !label_is_masked; j += width) {
      const int64_t i = in.index[n * in.k + j];
      const acc z_other = widen(z[i]);
      if (math::is_masked(z_other)) continue;
      const acc grad_gap = in.grad_gap[n * in.gap_strides[0] + j * in.gap_strides[1]];
      total += grad_gap;
      if (i < begin || i >= end) continue;
      const acc q = weights.of_others == acc(0) ? acc(0) : static_cast<acc>(exp(z_other - max)) / sum;
      dz[i] = narrow<T>(weights.other(q, false) + grad_gap);
    }
    total = sum_lanes(total, width);
    if (lane != 0 || silent || y < begin || y >= end) return;
    dz[y] = narrow<T>(weights.label(label_is_masked) - total);
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

// Blocks per multiprocessor: a word under way per thread needs many of them; float64 has registers for few.
template <class T>
constexpr int kBackwardBlocks = sizeof(T) == 8   ? 1
                                : sizeof(T) == 4 ? 5
                                                 : 4;

// `threads` = 32: a warp per row; 256: a block for every part of a row.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kBackwardBlocks<T>)
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
