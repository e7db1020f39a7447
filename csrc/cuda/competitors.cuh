// The k strongest classes without the label, their gaps and the cross-entropy, from one read of the logits [N, C].
//
//   C <= 2048     1 to 32 lanes of a warp per row
//   beyond        blocks of 256 threads, each for a part of a row; a second kernel merges their lists and sums in the
//                 order of the parts
//
// A thread reads 16 to 64 logits of its row in 16-byte words, all of them under way at once, and keeps them in registers
// (held_row.cuh): every logit is read from memory once. With the largest competitor known the exponentials are summed
// relative to it, and whatever is NaN or +inf makes this sum NaN.
//
// The k best: the k-th largest of the lanes' own maxima is a bound that k classes reach. Those that reach it are little
// more than k, and only packs whose maximum reaches it are looked at. They are ranked by comparisons of the logits
// themselves, equal ones by class, so ties are exact in every type. Where there are too many of them, or too few lanes
// for a bound, the best is taken out k times. k > 32 of a row in parts reads the row again for every 32 competitors.
//
// Neither cp.async nor clusters would help: the words under way are 16 KiB a block already, what is read is needed by
// the thread that reads it alone, and parts exchange a few numbers.
//
// Forward moves N C logits in and N (2 k + 5) numbers out; backward N C in and N C out, both once.
#pragma once

#include <algorithm>

#include "../math/competitors.h"
#include "device.cuh"
#include "held_row.cuh"

namespace margin_kernels::cuda {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
constexpr int kListed = 32;  // entries of a list: one per lane

// Logits that a thread holds of a row at most: 64 registers. Up to so many classes are held by lanes of one warp.
template <class T>
constexpr int kHeld = 256 / sizeof(T);
template <class T>
constexpr int kWarpClasses = sizeof(T) == 8 ? 1024 : 2048;

// Logits that a thread holds of a row in parts, and classes of a part.
template <class T>
constexpr int kPartHeld = sizeof(T) == 2 ? 64 : 32;
template <class T>
constexpr int kPartClasses = kRowThreads * kPartHeld<T>;

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
  // The word in which each row can be read.
  __device__ int word() const {
    const auto places = reinterpret_cast<uintptr_t>(logits) | static_cast<uintptr_t>(row_stride) * sizeof(T);
    return word_of(reinterpret_cast<const T*>(places));
  }
};

// exp(x) for x <= 0
__device__ __forceinline__ double exp_nonpositive(double x) { return exp(x); }
__device__ __forceinline__ float exp_nonpositive(float x) { return exp2f(x * 1.44269504f); }

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

// Over competitors of a row: the largest, sum_i exp(z_i - max), and if they are asked for, over the finite ones, their
// number and the sum of max - z_i. sum is NaN where a logit is NaN or +inf.
template <class acc>
struct SumExp {
  acc max = -infinite<acc>(), sum = 0, count = 0, deficit = 0;

  __device__ __forceinline__ void merge(const SumExp& other) {
    const SumExp before = raised(Word<acc>::larger(max, other.max)), added = other.raised(before.max);
    *this = before;
    sum += added.sum;
    count += added.count;
    deficit += added.deficit;
  }
  // Over the lanes of a warp.
  __device__ __forceinline__ void merge_lanes(bool with_deficit) {
    *this = raised(reduce_lanes(max, 32, [](acc a, acc b) { return Word<acc>::larger(a, b); }));
    sum = sum_lanes(sum);
    if (!with_deficit) return;
    count = sum_lanes(count);
    deficit = sum_lanes(deficit);
  }

 private:
  // The same, relative to a number that is not smaller than max.
  __device__ __forceinline__ SumExp raised(acc larger) const {
    SumExp other = *this;
    other.max = larger;
    if (max < larger) {
      other.sum *= exp_nonpositive(max - larger);
      if (count > acc(0)) other.deficit += count * (larger - max);
    }
    return other;
  }
};

// Without NaN, +inf and an invalid target; some logit must be finite.
template <class acc>
__device__ __forceinline__ bool is_usable(const Label& label, const SumExp<acc>& total, acc z_label) {
  return label.valid && z_label < infinite<acc>() && total.sum == total.sum &&
         (total.max > -infinite<acc>() || !math::is_masked(z_label));
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
    sum = total.sum;
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

// Entry j of the list: a finite competitor.
template <class T>
__device__ __forceinline__ void write_competitor(const CompetitorsIn<T>& in, int64_t n, int j, acc_t<T> value,
                                                 int index, acc_t<T> z_label) {
  in.index[n * in.k + j] = index;
  in.gap[n * in.k + j] = value - z_label;
}

// Entry j of a list with `finite` competitors, none of them number j. An ignored row names the first k classes, one with
// NaN the first k other than the label, so that a gather stays legal. Behind the finite competitors come the masked
// ones, in their order; they are looked for in the row.
template <class T>
__device__ __forceinline__ void write_no_competitor(const CompetitorsIn<T>& in, int64_t n, int j, const Label& label,
                                                    bool usable, int finite) {
  using acc = acc_t<T>;
  int index = j;
  acc gap = 0;
  if (!label.ignored && !usable) {
    index = j < label.y ? j : j + 1;
    gap = infinite<acc>() - infinite<acc>();
  } else if (!label.ignored) {
    int behind = j - finite;
    for (index = 0;; ++index) {
      if (index == label.y || !math::is_masked<acc>(widen(in.row(n)[index]))) continue;
      if (behind-- == 0) break;
    }
    gap = -infinite<acc>();
  }
  in.index[n * in.k + j] = index;
  in.gap[n * in.k + j] = gap;
}

// ----------------------------------------------------------------------------------------------------- selection

template <int width, class Value>
__device__ __forceinline__ Value largest_of_lanes(Value value) {
  return reduce_lanes(value, width, [](Value a, Value b) { return a > b ? a : b; });
}
template <int width>
__device__ __forceinline__ int largest_of_lanes(int value) {
  if constexpr (width == 32) return __reduce_max_sync(kWarp, value);
  return reduce_lanes(value, width, [](int a, int b) { return a > b ? a : b; });
}

// Floats as integers of the same order, -0 as 0. Shuffles take integers as they are, and a warp finds the largest of its
// integers in one instruction.
__device__ __forceinline__ int ordered(float x) {
  const int bits = static_cast<int>(__float_as_uint(x + 0.0f));
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int bits) {
  return __uint_as_float(static_cast<uint32_t>(bits ^ (bits >> 31 & 0x7fffffff)));
}

// The number where one is NaN.
template <int width>
__device__ __forceinline__ double max_lanes(double value) {
  return reduce_lanes(value, width, [](double a, double b) { return fmax(a, b); });
}
template <int width>
__device__ __forceinline__ float max_lanes(float value) {
  if constexpr (width == 32) return from_ordered(largest_of_lanes<32>(ordered(fmaxf(value, -infinite<float>()))));
  return reduce_lanes(value, width, [](float a, float b) { return fmaxf(a, b); });
}

// The k largest of a row, in order: emit(j, class, logit) by the lane that holds number j, for every j below the number
// of finite ones, which is returned. They are taken out of the row. `max` is the row's largest.
template <int width, class Row, class Emit>
__device__ __forceinline__ int extract(Row& row, typename Row::acc max, int k, const Emit& emit) {
  using acc = typename Row::acc;
  int finite = 0;
  MK_ROLLED
  for (int j = 0;;) {
    int i = kNoClass;
    acc value = 0;
    if (max > -infinite<acc>()) {
      row.each_from(max, [&](int c, acc v) {
        if (c < i) {
          i = c;
          value = v;
        }
      });
    }
    const int first = -largest_of_lanes<width>(-i);
    if (first != kNoClass) ++finite;
    const bool mine = first != kNoClass && i == first;
    if (mine) emit(j, i, value);
    if (++j == k) return finite;
    if (mine) row.remove(i);
    max = max_lanes<width>(row.maximum());
  }
}

// The k-th largest of the values of `width` lanes, or a smaller one: equal ones count once. `least` if there are too few.
template <int width, class Value>
__device__ __forceinline__ Value kth_largest(Value value, Value least, int k) {
  MK_ROLLED
  for (int j = 1;; ++j) {
    const Value largest = largest_of_lanes<width>(value);
    if (j == k) return largest;
    if (value == largest) value = least;
  }
}
template <int width>
__device__ __forceinline__ double kth_of_lanes(double value, int k) {
  return kth_largest<width>(value, -infinite<double>(), k);
}
template <int width>
__device__ __forceinline__ float kth_of_lanes(float value, int k) {
  return from_ordered(kth_largest<width>(ordered(value), ordered(-infinite<float>()), k));
}

// Competitors that lanes have found, in no order.
template <class acc>
struct Found {
  acc value[kListed];
  int index[kListed];
};

// Where the lanes of a block put the packs that they look at more closely; a lane has room for three.
template <class T>
struct ReachedPacks {
  static constexpr unsigned kOwn = 3;
  Pack<T> pack[kOwn * kRowThreads];
  int first_class[kOwn * kRowThreads];
  unsigned place[kRowThreads / 4 * kListed / 2];  // of one row after the other: which of `pack`
};

// Puts all logits of a row from `least` on into `to`. Their number; kNoClass where they are too many for the places, or
// where least is -inf: in one row of the warp is as in all.
template <int width, class T, class Row>
__device__ __forceinline__ int find(const Row& row, typename Row::acc least, ReachedPacks<T>& packs,
                                    Found<typename Row::acc>& to) {
  using acc = typename Row::acc;
  constexpr unsigned size = Row::size, kOwn = ReachedPacks<T>::kOwn, most = width < 8 ? kListed / 2 : kListed;
  const unsigned lane = threadIdx.x % 32;
  const uint32_t before = (1u << lane) - 1u;
  const uint32_t together = width == 32 ? kWarp : ((1u << width % 32) - 1u) << (lane & ~(width - 1u));
  unsigned* const place = packs.place + threadIdx.x / width * most;
  const unsigned thread = threadIdx.x, in_row = lane % width;
  unsigned next = thread;  // the place of this lane's next pack
  if (least > -infinite<acc>()) {
    row.each_pack_from(least, [&](int first_class, const typename Row::word(&words)[Row::words]) {
      const unsigned at = next < kOwn * kRowThreads ? next : thread;
      store_words(&packs.pack[at], words);
      packs.first_class[at] = first_class;
      next += kRowThreads;
    });
  } else {
    next = (kOwn + 1) * kRowThreads;
  }
  unsigned number = 0;
  MK_UNROLL
  for (unsigned s = 0; s < kOwn; ++s) {
    const bool has = next >= (s + 1) * kRowThreads;
    const uint32_t lanes = __ballot_sync(kWarp, has) & together;
    const unsigned at = number + __popc(lanes & before);
    if (has && at < most) place[at] = s * kRowThreads + thread;
    number += __popc(lanes);
  }
  if (__any_sync(kWarp, next >= (kOwn + 1) * kRowThreads || number > most)) return kNoClass;
  __syncwarp();
  unsigned total = 0;
  MK_ROLLED
  for (unsigned begin = 0; __any_sync(kWarp, begin < number * size); begin += width) {
    const unsigned e = begin + in_row, j = e % size;
    acc v = 0;
    int i = 0;
    bool reaches = false;
    if (e < number * size) {
      const unsigned at = place[e / size];
      v = widen(packs.pack[at].data[j]);
      i = packs.first_class[at] + static_cast<int>(j);
      reaches = v >= least;
    }
    const uint32_t lanes = __ballot_sync(kWarp, reaches) & together;
    const unsigned at = total + __popc(lanes & before);
    if (reaches && at < most) {
      to.value[at] = v;
      to.index[at] = i;
    }
    total += __popc(lanes);
  }
  if (__any_sync(kWarp, total > most)) return kNoClass;
  return static_cast<int>(total);
}

// ------------------------------------------------------------------------------------------------- rows of a warp

// `width` lanes hold a row of more than `more_than` and up to width * held classes.
template <class T, int width, int held, int more_than>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 2) competitors_row_kernel(CompetitorsIn<T> in) {
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size, packs = held / size;
  // Up to this k the k-th largest of the lanes' maxima is a bound that few classes reach.
  constexpr int finds = width == 1 ? 0 : width < 16 ? width * 3 / 4 : width / 2;
  __shared__ ReachedPacks<T> reached;
  __shared__ Found<acc> found[finds > 0 ? kRowThreads / width : 1];
  const int lane = threadIdx.x % width;
  int64_t n = static_cast<int64_t>(blockIdx.x) * (kRowThreads / width) + threadIdx.x / width;
  if (n - threadIdx.x % 32 / width >= in.rows) return;  // the whole warp; no barrier follows
  // Lanes behind the last row repeat it for the shuffles and write nothing.
  const bool beyond = n >= in.rows;
  if (beyond) n = in.rows - 1;
  HeldRow<T, width, packs> row(lane);
  row.template load<more_than / (width * size)>(in.row(n), in.classes, in.word());
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
  acc z_label = row.take(static_cast<unsigned>(label.y));
  if constexpr (width > 1)
    z_label = __shfl_sync(kWarp, z_label, static_cast<int>(static_cast<unsigned>(label.y) / size % width), width);

  SumExp<acc> total;
  const acc mine = row.find_maximum();
  total.max = max_lanes<width>(mine);
  // Competitors that are all masked have the sum 0: nothing is subtracted from -inf.
  const Exponential<acc> exponential(total.max > -infinite<acc>() ? total.max : acc(0));
  total.sum = sum_lanes(row.sum(exponential), width) * exponential.correction();
  if (in.uniform) {
    row.deficit_and_count(total.max, total.deficit, total.count);
    total.deficit = sum_lanes(total.deficit, width);
    total.count = sum_lanes(total.count, width);
  }
  const bool usable = is_usable(label, total, z_label);
  if (lane == 0 && !beyond) write_losses(in, n, label, usable, total, z_label);
  if (in.k == 0) return;

  const bool listed = usable && !label.ignored && !beyond;
  const auto emit = [&](int j, int i, acc v) {
    if (listed) write_competitor(in, n, j, v, i, z_label);
  };
  int finite = kNoClass;
  if constexpr (finds > 0) {
    if (in.k > 1 && in.k <= finds) {
      Found<acc>& candidates = found[threadIdx.x / width];
      const int count = find<width>(row, kth_of_lanes<width>(mine, in.k), reached, candidates);
      if (count != kNoClass) {
        __syncwarp();
        MK_ROLLED
        for (int s = lane; s < count; s += width) {
          const acc v = candidates.value[s];
          const int i = candidates.index[s];
          int rank = 0;
          for (int r = 0; r < count; ++r) rank += math::comes_before(candidates.value[r], candidates.index[r], v, i);
          if (rank < in.k) emit(rank, i, v);
        }
        finite = in.k;
      }
    }
  }
  if (finite == kNoClass) finite = extract<width>(row, total.max, in.k, emit);
  if (beyond) return;
  if (!listed) finite = 0;
  for (int j = finite + lane; j < in.k; j += width) write_no_competitor(in, n, j, label, usable, finite);
}

// ------------------------------------------------------------------------------------------------- rows in parts

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

  __device__ __forceinline__ int finite() const {
    return __popc(__ballot_sync(kWarp, static_cast<int>(threadIdx.x % 32) < k && index != kNoClass));
  }
};

// Numbers done ... done + list.k - 1 of row n, by the whole warp. `before` says how many of the earlier were finite.
template <class T>
__device__ __forceinline__ void write_list(const CompetitorsIn<T>& in, int64_t n, int done, const Label& label,
                                           bool usable, const List<acc_t<T>>& list, int before, acc_t<T> z_label) {
  const int lane = threadIdx.x % 32, listed = usable && !label.ignored ? list.finite() : 0;
  if (lane < listed) {
    write_competitor(in, n, done + lane, list.value, list.index, z_label);
  } else if (lane < list.k) {
    write_no_competitor(in, n, done + lane, label, usable, before + listed);
  }
}

// Lists and sums of the parts of long rows.
template <class acc>
struct CompetitorsPart {
  acc* value;         // [N, parts, k]
  int* index;         // [N, parts, k]
  SumExp<acc>* sums;  // [N, parts]
};

// Block (n, p) takes part p of row n. k <= 32.
template <class T>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 8 ? 1 : 3)
    competitors_part_kernel(CompetitorsIn<T> in, int parts, CompetitorsPart<acc_t<T>> to) {
  using acc = acc_t<T>;
  constexpr int packs = kPartHeld<T> / Pack<T>::size, length = kPartClasses<T>;
  __shared__ ReachedPacks<T> reached;
  __shared__ Found<acc> found[kRowWarps];
  __shared__ int counts[kRowWarps];
  __shared__ acc maxima[32];  // of 8 threads each
  __shared__ acc sums[kRowWarps], deficits[kRowWarps], numbers[kRowWarps], label_logit;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t n = blockIdx.x;
  const int part = static_cast<int>(blockIdx.y), begin = part * length;
  const T* from = in.row(n) + begin;
  HeldRow<T, kRowThreads, packs> row(thread);
  if (in.classes - begin >= length) {
    row.template load<packs>(from, length, in.word());
  } else {
    row.template load<0>(from, in.classes - begin, in.word());
  }
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
  const unsigned y = static_cast<unsigned>(label.y) - static_cast<unsigned>(begin);
  const acc taken = row.take(y);
  if (y / Pack<T>::size % kRowThreads == threadIdx.x) label_logit = taken;

  const acc mine = row.find_maximum();
  const acc of_eight = max_lanes<8>(mine);
  if (lane % 8 == 0) maxima[thread / 8] = of_eight;
  __syncthreads();
  SumExp<acc> total;
  const acc group = maxima[lane];
  total.max = max_lanes<32>(group);
  const Exponential<acc> exponential(total.max > -infinite<acc>() ? total.max : acc(0));
  const acc sum = sum_lanes(row.sum(exponential)) * exponential.correction();
  if (lane == 0) sums[warp] = sum;
  if (in.uniform) {
    acc deficit = 0, number = 0;
    row.deficit_and_count(total.max, deficit, number);
    deficit = sum_lanes(deficit);
    number = sum_lanes(number);
    if (lane == 0) {
      deficits[warp] = deficit;
      numbers[warp] = number;
    }
  }
  if (in.k > 0) {
    // Of 32 groups of 8 threads the k best have maxima from here on.
    int count = find<32>(row, in.k == 1 ? total.max : kth_of_lanes<32>(group, in.k), reached, found[warp]);
    if (count == kNoClass) {
      __syncwarp();
      count = extract<32>(row, max_lanes<32>(mine), in.k, [&](int j, int i, acc v) {
        found[warp].value[j] = v;
        found[warp].index[j] = i;
      });
    }
    if (lane == 0) counts[warp] = count;
  }
  __syncthreads();
  if (warp != 0) return;

  total.sum = sum_lanes(sums[lane % kRowWarps], kRowWarps);
  if (in.uniform) {
    total.deficit = sum_lanes(deficits[lane % kRowWarps], kRowWarps);
    total.count = sum_lanes(numbers[lane % kRowWarps], kRowWarps);
  }
  List<acc> list(in.k);
  if (in.k > 0) {
    MK_ROLLED
    for (int w = 0; w < kRowWarps; ++w) {
      const bool candidate = lane < counts[w];
      list.offer(candidate ? found[w].value[lane] : acc(0), candidate ? found[w].index[lane] : 0, candidate);
    }
  }
  if (parts > 1) {
    const int64_t place = n * parts + part;
    if (lane == 0) to.sums[place] = total;
    if (lane < in.k) {
      to.value[place * in.k + lane] = list.value;
      to.index[place * in.k + lane] = list.index == kNoClass ? kNoClass : begin + list.index;
    }
  } else {
    const acc z_label = label_logit;
    const bool usable = is_usable(label, total, z_label);
    if (lane == 0) write_losses(in, n, label, usable, total, z_label);
    write_list(in, n, 0, label, usable, list, 0, z_label);
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
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
  const acc z_label = widen(in.row(n)[label.y]);
  SumExp<acc> total;
  for (int part = lane; part < parts; part += 32) total.merge(from.sums[n * parts + part]);
  total.merge_lanes(in.uniform != nullptr);
  List<acc> list(in.k);
  for (int e = 0; e < parts * in.k; e += 32) {
    const int64_t place = n * parts * in.k + e + lane;
    const bool candidate = e + lane < parts * in.k;
    const acc v = candidate ? from.value[place] : acc(0);
    list.offer(v, candidate ? from.index[place] : 0, candidate);
  }
  const bool usable = is_usable(label, total, z_label);
  if (lane == 0) write_losses(in, n, label, usable, total, z_label);
  write_list(in, n, 0, label, usable, list, 0, z_label);
}

// Offers the classes of a row that come after (bound, bound_index) to the lists of the warps of a block.
template <class T>
__device__ __forceinline__ void scan(const T* row, int classes, int word, int y, acc_t<T> bound, int bound_index,
                                     List<acc_t<T>>& list) {
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  for (int base = 0; base < classes; base += kRowThreads * size) {  // the same for every lane
    const int begin = base + static_cast<int>(threadIdx.x) * size;
    Pack<T> pack;
    acc largest = -infinite<acc>();
    if (begin + size <= classes) {
      pack = load_pack(row + begin, word);
    } else {
      MK_UNROLL
      for (int j = 0; j < size; ++j) pack.data[j] = row[begin + j < classes ? begin + j : classes - 1];
    }
    MK_UNROLL
    for (int j = 0; j < size; ++j) largest = Word<acc>::larger(largest, widen(pack.data[j]));
    if (!__any_sync(kWarp, largest >= list.last && largest > -infinite<acc>())) continue;
    MK_UNROLL
    for (int j = 0; j < size; ++j) {
      const int i = begin + j;
      const acc v = widen(pack.data[j]);
      list.offer(v, i, i < classes && i != y && v > -infinite<acc>() && math::comes_before(bound, bound_index, v, i));
    }
  }
}

// The list alone for k > 32: a block per row, which is read for every 32 competitors.
template <class T>
__global__ void __launch_bounds__(kRowThreads) competitors_many_kernel(CompetitorsIn<T> in) {
  using acc = acc_t<T>;
  __shared__ Found<acc> found[kRowWarps];
  __shared__ acc last;
  __shared__ int last_index;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.x;
  const T* row = in.row(n);
  const Label label(in.target[n * in.target_stride], in.classes, in.ignore_index);
  const acc z_label = widen(row[label.y]), sum = in.normalizer[3 * n + 1];
  const bool usable = sum == sum;
  acc bound = infinite<acc>();
  int bound_index = kNoClass, finite = 0;
  for (int done = 0; done < in.k; done += kListed) {
    List<acc> list(in.k - done < kListed ? in.k - done : kListed);
    if (usable && !label.ignored) scan(row, in.classes, in.word(), label.y, bound, bound_index, list);
    found[warp].value[lane] = list.value;
    found[warp].index[lane] = list.index;
    __syncthreads();
    if (warp == 0) {
      MK_ROLLED
      for (int w = 1; w < kRowWarps; ++w) {
        list.offer(found[w].value[lane], found[w].index[lane], found[w].index[lane] != kNoClass);
      }
      write_list(in, n, done, label, usable, list, finite, z_label);
      finite += list.finite();
      if (lane == 0) {
        last = list.last;
        last_index = list.last_index;
      }
    }
    __syncthreads();
    bound = last;
    bound_index = last_index;
  }
}

// ------------------------------------------------------------------------------------------------------ backward

constexpr int kShortClasses = 128, kShortLogits = 4;  // logits per lane
constexpr int kBackwardWarp = 2048, kBackwardClasses = 32768;

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
  Exponential<acc> exponential;
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
        exponential(max),
        factor(0) {
    if (!(sum > acc(0))) return;
    z_label = widen(z[y]);
    weights = math::RowWeights<acc>(in_.grad_nll[n_], in_.grad_phi[n_], in_.grad_uniform[n_], z_label, max, sum,
                                    in_.normalizer[3 * n_ + 2]);
    factor = weights.of_others / sum * exponential.correction();
  }

  __device__ bool is_nan() const { return sum != sum; }
  __device__ bool is_constant() const { return !(sum > acc(0)) || weights.is_zero(); }
  __device__ acc constant() const { return is_nan() ? sum : acc(0); }
  // Without a share for every finite class, and from logits of which Exponential needs no difference.
  __device__ bool is_plain() const { return weights.share == acc(0) && !exponential.large; }
  // Of the label it may be anything: its entry is written again.
  template <bool plain>
  __device__ __forceinline__ T entry(T logit) const {
    const acc v = widen(logit);
    if constexpr (plain) return narrow<T>(exponential.template of<false>(v) * factor);
    const acc power = exponential.large ? exponential.template of<true>(v) : exponential.template of<false>(v);
    return narrow<T>(power * factor - (math::is_masked(v) ? acc(0) : weights.share));
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
template <class T, int width>
__global__ void __launch_bounds__(kRowThreads) competitors_backward_short_kernel(CompetitorsBackwardIn<T> in) {
  const int lane = threadIdx.x % width;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kRowThreads / width) + threadIdx.x / width;
  const bool beyond = n >= in.rows;
  const RowGradient<T> row(in, beyond ? in.rows - 1 : n);
  if (!beyond) {
    MK_UNROLL
    for (int e = 0; e < kShortLogits; ++e) {
      const int i = lane + e * width;
      if (i < in.classes)
        row.dz[i] = row.is_constant() ? narrow<T>(row.constant()) : row.template entry<false>(row.z[i]);
    }
  }
  __syncwarp();
  // Lanes behind the last row stay for the shuffles, with an empty range of classes.
  row.special_entries(0, beyond ? 0 : in.classes, lane, width);
}

// Blocks per multiprocessor: two words under way per thread need many of them; float64 has registers for few.
template <class T>
constexpr int kBackwardBlocks = sizeof(T) == 8   ? 1
                                : sizeof(T) == 4 ? 5
                                                 : 4;

// Classes [begin, end) of a row that is not constant.
template <bool plain, int threads, class T>
__device__ __forceinline__ void write_entries(const RowGradient<T>& row, int begin, int end) {
  constexpr int size = Pack<T>::size, stride = threads * size;
  const int word = word_of(row.z), word_to = word_of(row.dz);
  const auto store = [&](int i, Pack<T> pack) {
    MK_UNROLL
    for (int j = 0; j < size; ++j) pack.data[j] = row.template entry<plain>(pack.data[j]);
    store_pack(row.dz + i, pack, word_to);
  };
  int i = begin + static_cast<int>(threadIdx.x % threads) * size;
  for (; i + stride + size <= end; i += 2 * stride) {
    const Pack<T> a = load_pack(row.z + i, word), b = load_pack(row.z + i + stride, word);
    store(i, a);
    store(i + stride, b);
  }
  for (; i + size <= end; i += stride) store(i, load_pack(row.z + i, word));
  for (; i < end; ++i) row.dz[i] = row.template entry<plain>(row.z[i]);
}

// `threads` = 32: a warp per row; 256: block (n, p) takes part p of row n.
template <class T, int threads>
__global__ void __launch_bounds__(kRowThreads, kBackwardBlocks<T>)
    competitors_backward_kernel(CompetitorsBackwardIn<T> in, int part_length) {
  constexpr int size = Pack<T>::size, per_block = kRowThreads / threads;
  const int thread = threadIdx.x % threads;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * per_block + threadIdx.x / threads;
  if (n >= in.rows) return;  // a whole warp, or none
  const int begin = static_cast<int>(blockIdx.y) * part_length;
  const int end = in.classes - begin < part_length ? in.classes : begin + part_length;
  const RowGradient<T> row(in, n);
  if (row.is_constant()) {
    Pack<T> pack;
    MK_UNROLL
    for (int j = 0; j < size; ++j) pack.data[j] = narrow<T>(row.constant());
    const int word_to = word_of(row.dz);
    int i = begin + thread * size;
    for (; i + size <= end; i += threads * size) store_pack(row.dz + i, pack, word_to);
    for (; i < end; ++i) row.dz[i] = pack.data[0];
  } else if (row.is_plain()) {
    write_entries<true, threads>(row, begin, end);
  } else {
    write_entries<false, threads>(row, begin, end);
  }
  if (threads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (thread < 32) row.special_entries(begin, end, thread, 32);
}

// ------------------------------------------------------------------------------------------------------ launches

template <class T>
int parts_of(int classes) {
  return (classes + kPartClasses<T> - 1) / kPartClasses<T>;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Equal parts, multiples of any pack.
inline int length_of_part(int classes, int parts) { return ((classes + parts - 1) / parts + 15) / 16 * 16; }

// Entries of the workspace of CompetitorsPart: (lists, sums)
template <class T>
std::pair<int64_t, int64_t> competitors_workspace(int64_t rows, int classes, int k) {
  const int64_t parts = parts_of<T>(classes);
  if (parts == 1) return {0, 0};
  return {rows * parts * (k > kListed ? 0 : k), rows * parts};
}

// A lane for up to 16 classes. For more 4, until each holds all that it can; then 8, 16 and 32. Lanes per row depend on C
// only, and so does the order of the sums.
template <class T, int width, int held, int more_than, class Launch>
void competitors_rows(const Launch& launch, const CompetitorsIn<T>& in) {
  constexpr int classes = width * held;
  if (in.classes <= classes) {
    launch(competitors_row_kernel<T, width, held, more_than>, blocks_for(in.rows, kRowThreads / width), kRowThreads, 0,
           in);
  } else if constexpr (classes < kWarpClasses<T>) {
    constexpr bool more_lanes = width == 1 || held == kHeld<T>;
    competitors_rows<T,
                     width == 1   ? 4
                     : more_lanes ? 2 * width
                                  : width,
                     more_lanes ? held : 2 * held, classes>(launch, in);
  }
}

template <class T, class Launch>
void competitors_forward(const Launch& launch, const CompetitorsIn<T>& in, const CompetitorsPart<acc_t<T>>& workspace) {
  if (in.rows == 0) return;
  if (in.classes <= kWarpClasses<T>) return competitors_rows<T, 1, 16, 0>(launch, in);
  const int parts = parts_of<T>(in.classes);
  CompetitorsIn<T> first = in;
  if (in.k > kListed) first.k = 0;
  launch(competitors_part_kernel<T>, dim3(static_cast<unsigned>(in.rows), static_cast<unsigned>(parts)), kRowThreads, 0,
         first, parts, workspace);
  if (parts > 1) {
    launch(competitors_merge_kernel<T>, blocks_for(in.rows, kRowWarps), kRowThreads, 0, first, parts, workspace);
  }
  if (in.k > kListed) launch(competitors_many_kernel<T>, static_cast<unsigned>(in.rows), kRowThreads, 0, in);
}

template <class T, int width, class Launch>
void competitors_backward_short(const Launch& launch, const CompetitorsBackwardIn<T>& in) {
  if constexpr (width < 32) {
    if (in.classes > width * kShortLogits) return competitors_backward_short<T, 2 * width>(launch, in);
  }
  launch(competitors_backward_short_kernel<T, width>, blocks_for(in.rows, kRowThreads / width), kRowThreads, 0, in);
}

template <class T, class Launch>
void competitors_backward(const Launch& launch, const CompetitorsBackwardIn<T>& in) {
  if (in.rows == 0) return;
  if (in.classes <= kShortClasses) {
    competitors_backward_short<T, 4>(launch, in);
  } else if (in.classes <= kBackwardWarp) {
    launch(competitors_backward_kernel<T, 32>, blocks_for(in.rows, kRowWarps), kRowThreads, 0, in, in.classes);
  } else {
    const int parts = (in.classes + kBackwardClasses - 1) / kBackwardClasses;
    launch(competitors_backward_kernel<T, kRowThreads>,
           dim3(static_cast<unsigned>(in.rows), static_cast<unsigned>(parts)), kRowThreads, 0, in,
           length_of_part(in.classes, parts));
  }
}

}  // namespace margin_kernels::cuda
