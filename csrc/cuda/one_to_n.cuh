// The 1-to-N loss: masked log-sum-exp of the columns in tiles of rows, two stages, then one number per sample.
//
// Forward reads the logits once (with cross-entropy twice) and writes a maximum and a sum per column for every chunk of
// rows; backward reads the logits once and writes dlogits once. How rows are cut into chunks follows from N and C alone,
// and every sum has a fixed order.
//
// A tile is up to 32 packs of columns, a lane each, by as many rows as 256 threads then hold: 8 with 32 lanes, 64 with
// the 4 lanes of 10 classes. A thread has 8 loads of 16 bytes under way in forward and 4 in backward. A target outside
// [0, C) makes its row NaN, in every column: whose negatives it holds is unknown.
//
// An H200 issues 4.7 instructions of a lane in the time of a byte (60 % of 132 x 4 x 32 at 1.98 GHz, 4.3 TB/s): 18 for a
// logit of float32 that is read, 9 for one of bfloat16, twice that where a slope is written as well. Hence one exp2 and
// few others an element: what is rare (a label, an invalid target) is a branch of the pack.
#pragma once

#include "../math/one_to_n.h"
#include "device.cuh"

namespace margin_kernels::cuda {

template <class T>
struct OneToN {
  const T* logits;  // [N, C]
  int64_t stride, samples, classes;
  const int64_t* target;  // [N]
  acc_t<T> delta;

  __device__ bool valid(int64_t y) const { return static_cast<uint64_t>(y) < static_cast<uint64_t>(classes); }
};

template <class acc>
constexpr acc kNothing = static_cast<acc>(-HUGE_VAL);

// Exponentials are powers of 2: exp(x) = 2^(kLog2e x).
template <class acc>
constexpr acc kLog2e = static_cast<acc>(1.4426950408889634);

template <class acc>
__device__ __forceinline__ acc exp_of(acc x) {
  return exp2_flushed(x * kLog2e<acc>);
}

// max kLog2e, rounded: never part of an fma, so that it is the same wherever a sum relative to it is used.
template <class acc>
__device__ __forceinline__ acc exponent_of(acc max) {
  return rounded_product(max, kLog2e<acc>);
}

// What exponents are taken relative to: 0 where there is nothing yet, so that 2^(-inf - base) is 0 there too.
template <class acc>
__device__ __forceinline__ acc base_of(acc max) {
  return max == kNothing<acc> ? acc(0) : exponent_of(max);
}

// The largest of the entries x so far, NaN left out, and the sum of 2^(x kLog2e - exponent_of(max)), NaN where an entry
// is NaN or +inf.
template <class acc>
struct alignas(2 * sizeof(acc)) LogSum {
  acc max, sum;

  template <int count>
  __device__ __forceinline__ void add(const acc (&entries)[count]) {
    acc top = max;
    MK_UNROLL
    for (int i = 0; i < count; ++i) top = std::fmax(top, entries[i]);
    const acc base = base_of(top);
    acc total = sum * exp2_flushed(exponent_of(max) - base);
    MK_UNROLL
    for (int i = 0; i < count; ++i) total += exp2_flushed(std::fma(entries[i], kLog2e<acc>, -base));
    max = top;
    sum = total;
  }
};

// Several sums as one, in their order.
template <class acc, int count>
__device__ __forceinline__ LogSum<acc> merged(const LogSum<acc> (&parts)[count]) {
  acc max = parts[0].max;
  MK_UNROLL
  for (int i = 1; i < count; ++i) max = std::fmax(max, parts[i].max);
  const acc base = base_of(max);
  acc sum = 0;
  MK_UNROLL
  for (int i = 0; i < count; ++i) sum += parts[i].sum * exp2_flushed(exponent_of(parts[i].max) - base);
  return {max, sum};
}

// The sums of lanes `first`, 2 first, ... `last` away as one; every lane gets the same bits.
template <class acc>
__device__ __forceinline__ LogSum<acc> merged_lanes(LogSum<acc> mine, int first, int last) {
  acc max = mine.max;
  for (int offset = first; offset <= last; offset *= 2) max = std::fmax(max, __shfl_xor_sync(kWarp, max, offset));
  acc sum = mine.sum * exp2_flushed(exponent_of(mine.max) - base_of(max));
  for (int offset = first; offset <= last; offset *= 2) sum += __shfl_xor_sync(kWarp, sum, offset);
  return {max, sum};
}

// max + log(sum), with what the rounding of max kLog2e left out.
template <class acc>
__device__ __forceinline__ acc logarithm(LogSum<acc> total) {
  const acc max = total.max == kNothing<acc> ? acc(0) : total.max;
  const acc left_out = std::fma(-max, kLog2e<acc>, exponent_of(max));
  return total.max + (std::log2(total.sum) + left_out) / kLog2e<acc>;
}

constexpr int kBlockBits = 8, kOneToNThreads = 1 << kBlockBits, kOneToNWarps = kOneToNThreads / 32;
constexpr int kForwardRows = 8, kBackwardRows = 4, kRowPacks = 4, kStageLoads = 8;  // loads of a thread under way
constexpr int kFewClasses = 256;                                                    // a warp looks for each
constexpr int64_t kWarpScoreBytes = 8192;                                           // longer rows take a block
constexpr int64_t kMostChunks = 256, kMostTiles = 4096;                             // of rows; of rows and columns

inline unsigned pieces(int64_t size, int64_t piece) { return static_cast<unsigned>((size + piece - 1) / piece); }

// How [N, C] is cut: 2^lane_bits lanes by the rows of a tile, `rows` rows a chunk.
struct Tiles {
  int lane_bits;
  unsigned columns, chunks;
  int64_t rows;

  Tiles(int64_t samples, int64_t classes, int pack, int rows_at_once) : lane_bits(0) {
    while (lane_bits < 5 && (static_cast<int64_t>(pack) << lane_bits) < classes) ++lane_bits;
    columns = pieces(classes, static_cast<int64_t>(pack) << lane_bits);
    const int64_t least = static_cast<int64_t>(kOneToNThreads >> lane_bits) * rows_at_once;
    const int64_t wanted = kMostTiles / columns, most = wanted < 1 ? 1 : wanted < kMostChunks ? wanted : kMostChunks;
    rows = pieces(pieces(samples, most), least) * least;
    chunks = samples == 0 ? 0 : pieces(samples, rows);
  }
};

template <class T>
Tiles forward_tiles(int64_t samples, int64_t classes) {
  return {samples, classes, Pack<T>::size, kForwardRows};
}

// Packs l at z + l step, all loads before any use. `left - l less` elements are left of a row from pack l on; what lies
// behind its end is -inf.
template <class T, int count>
__device__ __forceinline__ void load_packs(Pack<T> (&packs)[count], const T* z, int64_t step, int64_t left,
                                           int64_t less, int word) {
  constexpr int size = Pack<T>::size;
  if (word == 16 && left - (count - 1) * less >= size) {
    MK_UNROLL
    for (int l = 0; l < count; ++l) packs[l] = load_pack(z + l * step, 16);
    return;
  }
  MK_UNROLL
  for (int l = 0; l < count; ++l) {
    const int64_t here = left - l * less;
    if (here >= size) {
      packs[l] = load_pack(z + l * step, word);
    } else {
      MK_UNROLL
      for (int i = 0; i < size; ++i) packs[l].data[i] = i < here ? z[l * step + i] : narrow<T>(kNothing<acc_t<T>>);
    }
  }
}

// Adds rows row, row + step, ... of a pack of columns.
template <int count, class T>
__device__ __forceinline__ void add_rows(const OneToN<T>& in, LogSum<acc_t<T>> (&columns)[Pack<T>::size], int64_t row,
                                         int step, int64_t column, int word) {
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  Pack<T> packs[count];
  int64_t labels[count];
  load_packs(packs, in.logits + row * in.stride + column, step * in.stride, in.classes - column, 0, word);
  MK_UNROLL
  for (int r = 0; r < count; ++r) labels[r] = in.target[row + r * step];
  acc entries[size][count];
  MK_UNROLL
  for (int r = 0; r < count; ++r) {
    MK_UNROLL
    for (int i = 0; i < size; ++i) entries[i][r] = max_or_nan(widen(packs[r].data[i]), -in.delta);
    const bool valid = in.valid(labels[r]);
    if (!valid || static_cast<uint64_t>(labels[r] - column) < size) {
      const int own = static_cast<int>(labels[r] - column);
      MK_UNROLL
      for (int i = 0; i < size; ++i) {
        if (!valid || own == i) entries[i][r] = valid ? kNothing<acc> : static_cast<acc>(NAN);
      }
    }
  }
  MK_UNROLL
  for (int i = 0; i < size; ++i) columns[i].add(entries[i]);
}

// Two blocks a multiprocessor leave 128 registers for a thread, too few for float64.
template <class T>
__global__ void __launch_bounds__(kOneToNThreads, sizeof(T) == 8 ? 1 : 2)
    one_to_n_columns_kernel(OneToN<T> in, int lane_bits, int64_t chunk_rows,
                            LogSum<acc_t<T>>* partials) {  // [chunks, C]
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1), step = kOneToNThreads >> lane_bits;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (lanes * size), column = first + lane * size;
  const int64_t begin = blockIdx.y * chunk_rows;
  const int64_t end = begin + chunk_rows < in.samples ? begin + chunk_rows : in.samples;
  LogSum<acc> mine[size];
  MK_UNROLL
  for (int i = 0; i < size; ++i) mine[i] = {kNothing<acc>, acc(0)};
  if (column < in.classes) {
    const int word = word_of(in.logits, in.stride);
    int64_t row = begin + (threadIdx.x >> lane_bits);
    for (; row + (kForwardRows - 1) * step < end; row += kForwardRows * step) {
      add_rows<kForwardRows>(in, mine, row, step, column, word);
    }
    for (; row < end; row += step) add_rows<1>(in, mine, row, step, column, word);
  }

  // The lanes of a warp that hold the same columns, then the warps.
  __shared__ LogSum<acc> tile[kOneToNWarps][32 * size];
  MK_UNROLL
  for (int i = 0; i < size; ++i) {
    if (lanes < 32) mine[i] = merged_lanes(mine[i], lanes, 16);
    if (static_cast<int>(threadIdx.x % 32) < lanes) tile[threadIdx.x / 32][lane * size + i] = mine[i];
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= lanes * size || first + c >= in.classes) return;
  LogSum<acc> warps[kOneToNWarps];
  MK_UNROLL
  for (int w = 0; w < kOneToNWarps; ++w) warps[w] = tile[w][c];
  partials[blockIdx.y * in.classes + first + c] = merged(warps);
}

// A_c from the chunks: a block for 32 columns, each warp takes every eighth chunk.
template <class acc>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_finish_kernel(const LogSum<acc>* partials, int64_t chunks, int64_t classes, acc shift, acc* column) {
  __shared__ LogSum<acc> stage[kOneToNWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  LogSum<acc> total{kNothing<acc>, acc(0)};
  if (c < classes) {
    for (int64_t begin = warp; begin < chunks; begin += kStageLoads * kOneToNWarps) {
      LogSum<acc> parts[kStageLoads + 1];
      MK_UNROLL
      for (int l = 0; l < kStageLoads; ++l) {
        const int64_t chunk = begin + l * kOneToNWarps;
        parts[l + 1] = chunk < chunks ? partials[chunk * classes + c] : LogSum<acc>{kNothing<acc>, acc(0)};
      }
      parts[0] = total;
      total = merged(parts);
    }
  }
  stage[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || c >= classes) return;
  LogSum<acc> parts[kOneToNWarps];
  MK_UNROLL
  for (int w = 0; w < kOneToNWarps; ++w) parts[w] = stage[w][lane];
  column[c] = logarithm(merged(parts)) + shift;
}

// logsumexp of each row, NaN where the row is not finite. 2^width_bits threads take a row: up to a warp, or the block.
template <class T>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_rows_kernel(OneToN<T> in, int width_bits, acc_t<T>* normalizer) {  // [N]
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  const int width = 1 << width_bits, thread = threadIdx.x & (width - 1);
  const int64_t n = (static_cast<int64_t>(blockIdx.x) << (kBlockBits - width_bits)) + (threadIdx.x >> width_bits);
  // Behind the last row threads read it once more: the shuffles ask for every lane.
  const T* z = in.logits + (n < in.samples ? n : in.samples - 1) * in.stride;
  const int word = word_of(in.logits, in.stride), step = width * size;
  LogSum<acc> mine{kNothing<acc>, acc(0)};
  for (int64_t begin = thread * size; begin < in.classes; begin += kRowPacks * step) {
    Pack<T> packs[kRowPacks];
    load_packs(packs, z + begin, step, in.classes - begin, step, word);
    acc entries[kRowPacks * size];
    MK_UNROLL
    for (int i = 0; i < kRowPacks * size; ++i) entries[i] = widen(packs[i / size].data[i % size]);
    mine.add(entries);
  }
  mine = merged_lanes(mine, 1, (width < 32 ? width : 32) / 2);
  if (width > 32) {
    __shared__ LogSum<acc> warps[kOneToNWarps];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    LogSum<acc> parts[kOneToNWarps];
    MK_UNROLL
    for (int w = 0; w < kOneToNWarps; ++w) parts[w] = warps[w];
    mine = merged(parts);
  }
  if (thread == 0 && n < in.samples) normalizer[n] = logarithm(mine);
}

// a_i, NaN for a target outside [0, C)
template <class T>
__device__ __forceinline__ acc_t<T> label_score(const OneToN<T>& in, int64_t n, int64_t y) {
  return math::bounded_label(widen(in.logits[n * in.stride + y]), in.delta);
}

template <class T>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_loss_kernel(OneToN<T> in, const acc_t<T>* column,
                         const acc_t<T>* normalizer,  // [N], or null without cross-entropy
                         acc_t<T>* loss) {
  using acc = acc_t<T>;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kOneToNThreads + threadIdx.x;
  if (n >= in.samples) return;
  const int64_t y = in.target[n];
  if (!in.valid(y)) {
    MK_DEVICE_ASSERT(false && "target must be in [0, C)");
    loss[n] = static_cast<acc>(NAN);
    return;
  }
  const acc a = label_score(in, n, y);
  loss[n] =
      normalizer ? math::one_to_n_cross_entropy_loss(column[y], normalizer[n], a) : math::one_to_n_loss(column[y], a);
}

// What backward needs of a sample, in one load.
template <class acc>
struct alignas(4 * sizeof(acc)) SampleSlope {
  acc label;             // - d loss / d z[i, y_i], without the softmax part of cross-entropy
  acc weight, relative;  // softmax part: weight exp(z - relative), NaN for a row that holds NaN
  std::conditional_t<sizeof(acc) == 8, int64_t, int> target;  // -1 outside of [0, C); no padding behind it
};

// SampleSlope, and for each segment of 256 samples, a block, the sum of grad_i s_i over its y_i = c, for every class.
template <class T>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_samples_kernel(OneToN<T> in, const acc_t<T>* column, const acc_t<T>* normalizer, const acc_t<T>* grad,
                            SampleSlope<acc_t<T>>* samples,  // [N]
                            double* segments) {              // [segments, C]
  using acc = acc_t<T>;
  __shared__ int targets[kOneToNThreads];
  __shared__ double values[kOneToNThreads];
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kOneToNThreads + threadIdx.x;
  const int64_t y = n < in.samples ? in.target[n] : -1;
  const int own = in.valid(y) ? static_cast<int>(y) : -1;
  double value = 0;
  if (n < in.samples) {
    const acc g = grad[n], positive = normalizer ? normalizer[n] : own < 0 ? acc(0) : label_score(in, n, y);
    const acc s = own < 0 ? static_cast<acc>(NAN) : math::negative_share(column[own], positive);
    samples[n] = {normalizer ? g : g * s, g * (acc(1) - s), positive, own};
    if (own >= 0) value = static_cast<double>(g) * s;
  }
  targets[threadIdx.x] = own;
  values[threadIdx.x] = value;
  double* const segment = segments + blockIdx.x * in.classes;
  if (in.classes > kFewClasses) {
    for (int64_t c = threadIdx.x; c < in.classes; c += kOneToNThreads) segment[c] = 0;
  }
  __syncthreads();
  double sum = 0;
  if (in.classes > kFewClasses) {  // the first sample of a class adds up all of them
    if (own < 0) return;
    bool first = true;
    MK_UNROLL
    for (int j = 0; j < kOneToNThreads; ++j) {
      if (targets[j] != own) continue;
      first = first && j >= static_cast<int>(threadIdx.x);
      sum += values[j];
    }
    if (first) segment[own] = sum;
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int c = threadIdx.x / 32; c < in.classes; c += kOneToNWarps) {
    sum = 0;
    MK_UNROLL
    for (int i = 0; i < kOneToNThreads; i += 32) sum += targets[i + lane] == c ? values[i + lane] : 0.0;
    sum = sum_lanes(sum);
    if (lane == 0) segment[c] = sum;
  }
}

// S_c = sum of grad_i s_i over y_i = c and the shift of the exponent: a block for 32 classes, each warp takes every
// eighth segment.
template <class acc>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_totals_kernel(const double* segments, const acc* column, int64_t count, int64_t classes,
                           acc positive_shift,
                           LogSum<acc>* totals) {  // [C]: {shift, S}
  __shared__ double stage[kOneToNWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (c < classes) {
    for (int64_t begin = warp; begin < count; begin += kStageLoads * kOneToNWarps) {
      double parts[kStageLoads];
      MK_UNROLL
      for (int l = 0; l < kStageLoads; ++l) {
        const int64_t segment = begin + l * kOneToNWarps;
        parts[l] = segment < count ? segments[segment * classes + c] : 0.0;
      }
      MK_UNROLL
      for (int l = 0; l < kStageLoads; ++l) sum += parts[l];
    }
  }
  stage[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= classes) return;
  for (int w = 1; w < kOneToNWarps; ++w) sum += stage[w][lane];
  const acc a = column[c];
  // A column that holds NaN gives NaN; without negatives nothing reads these numbers.
  totals[c] = {a - positive_shift, a != a ? a : static_cast<acc>(sum)};
}

// What backward needs of a pack of columns.
template <class T>
struct alignas(16) Totals {
  LogSum<acc_t<T>> of[Pack<T>::size];
};

// The pointers of backward.
template <class T>
struct OneToNSlopes {
  const LogSum<acc_t<T>>* totals;        // [C]: {shift, S}
  const SampleSlope<acc_t<T>>* samples;  // [N]
  bool cross_entropy;
  T* dlogits;  // [N, C]
};

// Writes rows row, row + step, ... of a pack of columns.
template <int count, class T>
__device__ __forceinline__ void write_rows(const OneToN<T>& in, const OneToNSlopes<T>& out, const Totals<T>& totals,
                                           int64_t row, int step, int column, int word, int word_to) {
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  const int64_t left = in.classes - column;
  Pack<T> packs[count];
  SampleSlope<acc> samples[count];
  load_packs(packs, in.logits + row * in.stride + column, step * in.stride, left, 0, word);
  MK_UNROLL
  for (int r = 0; r < count; ++r) samples[r] = load_whole(out.samples + row + r * step);
  T* to = out.dlogits + row * in.classes + column;
  MK_UNROLL
  for (int r = 0; r < count; ++r, to += step * in.classes) {
    const SampleSlope<acc> sample = samples[r];
    acc slopes[size];
    MK_UNROLL
    for (int i = 0; i < size; ++i) {
      const acc z = widen(packs[r].data[i]);
      slopes[i] = z <= -in.delta ? acc(0) : totals.of[i].sum * exp_of(z - totals.of[i].max);
    }
    const bool valid = sample.target >= 0;
    const int own = static_cast<int>(sample.target) - column;
    if (!valid || static_cast<unsigned>(own) < size) {
      const acc z = valid ? widen(in.logits[(row + r * step) * in.stride + sample.target]) : static_cast<acc>(NAN);
      const acc slope = math::label_part(math::finite_or_nan(z), in.delta, sample.label, acc(1));
      MK_UNROLL
      for (int i = 0; i < size; ++i) {
        if (!valid || own == i) slopes[i] = slope;
      }
    }
    if (out.cross_entropy) {
      const acc masked = sample.relative == sample.relative ? acc(0) : static_cast<acc>(NAN);
      MK_UNROLL
      for (int i = 0; i < size; ++i) {
        const acc z = widen(packs[r].data[i]);
        slopes[i] += math::is_masked_logit(z) ? masked : sample.weight * exp_of(z - sample.relative);
      }
    }
    MK_UNROLL
    for (int i = 0; i < size; ++i) packs[r].data[i] = narrow<T>(slopes[i]);
    if (left >= size) {
      store_pack(to, packs[r], word_to);
    } else {
      MK_UNROLL
      for (int i = 0; i < size; ++i) {
        if (i < left) to[i] = packs[r].data[i];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_backward_kernel(OneToN<T> in, int lane_bits, int64_t chunk_rows, OneToNSlopes<T> out) {
  constexpr int size = Pack<T>::size;
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1), step = kOneToNThreads >> lane_bits;
  const int column = (static_cast<int>(blockIdx.y) * lanes + lane) * size;
  if (column >= in.classes) return;
  Totals<T> totals;
  if (column + size <= in.classes) {
    totals = load_whole(reinterpret_cast<const Totals<T>*>(out.totals + column));
  } else {
    MK_UNROLL
    for (int i = 0; i < size; ++i) {
      if (column + i < in.classes) totals.of[i] = out.totals[column + i];
    }
  }
  const int64_t begin = blockIdx.x * chunk_rows;
  const int64_t end = begin + chunk_rows < in.samples ? begin + chunk_rows : in.samples;
  const int word = word_of(in.logits, in.stride), word_to = word_of(out.dlogits, in.classes);
  int64_t row = begin + (threadIdx.x >> lane_bits);
  for (; row + (kBackwardRows - 1) * step < end; row += kBackwardRows * step) {
    write_rows<kBackwardRows>(in, out, totals, row, step, column, word, word_to);
  }
  for (; row < end; row += step) write_rows<1>(in, out, totals, row, step, column, word, word_to);
}

inline int64_t one_to_n_segments(int64_t samples) { return pieces(samples, kOneToNThreads); }

// Threads of a row: for four packs each, up to a warp; a block for a long one.
template <class T>
int row_width_bits(int64_t classes) {
  if (classes * static_cast<int64_t>(sizeof(T)) > kWarpScoreBytes) return kBlockBits;
  int bits = 0;
  while (bits < 5 && (static_cast<int64_t>(kRowPacks * Pack<T>::size) << bits) < classes) ++bits;
  return bits;
}

template <class T, class Launch>
void one_to_n_forward(const Launch& launch, const OneToN<T>& in, bool positive, LogSum<acc_t<T>>* partials,
                      acc_t<T>* loss, acc_t<T>* column, acc_t<T>* normalizer) {
  using acc = acc_t<T>;
  const auto tiles = forward_tiles<T>(in.samples, in.classes);
  if (in.samples > 0) {
    launch(one_to_n_columns_kernel<T>, dim3(tiles.columns, tiles.chunks), kOneToNThreads, 0, in, tiles.lane_bits,
           tiles.rows, partials);
  }
  launch(one_to_n_finish_kernel<acc>, pieces(in.classes, 32), kOneToNThreads, 0, partials, tiles.chunks, in.classes,
         positive ? in.delta : acc(0), column);
  if (in.samples == 0) return;
  if (normalizer) {
    const int bits = row_width_bits<T>(in.classes);
    launch(one_to_n_rows_kernel<T>, pieces(in.samples, kOneToNThreads >> bits), kOneToNThreads, 0, in, bits,
           normalizer);
  }
  launch(one_to_n_loss_kernel<T>, pieces(in.samples, kOneToNThreads), kOneToNThreads, 0, in, column, normalizer, loss);
}

template <class T, class Launch>
void one_to_n_backward(const Launch& launch, const OneToN<T>& in, bool positive, const acc_t<T>* grad,
                       const acc_t<T>* column, const acc_t<T>* normalizer, SampleSlope<acc_t<T>>* samples,
                       double* segments, LogSum<acc_t<T>>* totals, T* dlogits) {
  using acc = acc_t<T>;
  if (in.samples == 0) return;
  const int64_t count = one_to_n_segments(in.samples);
  launch(one_to_n_samples_kernel<T>, static_cast<unsigned>(count), kOneToNThreads, 0, in, column, normalizer, grad,
         samples, segments);
  launch(one_to_n_totals_kernel<acc>, pieces(in.classes, 32), kOneToNThreads, 0, segments, column, count, in.classes,
         positive ? in.delta : acc(0), totals);
  const Tiles tiles(in.samples, in.classes, Pack<T>::size, kBackwardRows);
  const OneToNSlopes<T> out{totals, samples, normalizer != nullptr, dlogits};
  launch(one_to_n_backward_kernel<T>, dim3(tiles.chunks, tiles.columns), kOneToNThreads, 0, in, tiles.lane_bits,
         tiles.rows, out);
}

}  // namespace margin_kernels::cuda
