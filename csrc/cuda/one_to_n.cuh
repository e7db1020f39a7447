// The 1-to-N loss: masked log-sum-exp of the columns in tiles of rows, two stages, then one number per sample.
//
// Forward reads the logits once (with cross-entropy twice) and writes a maximum and a sum per column for every chunk of
// rows; backward reads the logits once and writes dlogits once. How rows are cut into chunks follows from N alone, and
// every sum has a fixed order.
//
// A tile is 32 packs of columns by 8 rows of threads. A target outside [0, C) makes its row NaN, in every column: whose
// negatives it holds is unknown.
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

  __device__ bool valid(int64_t y) const { return y >= 0 && y < classes; }
};

// The largest of a column's bounded entries so far and the sum of their exponentials relative to it.
template <class acc>
struct LogSum {
  acc max, sum;
};

constexpr int kTileLanes = 32, kTileRows = 8, kOneToNThreads = kTileLanes * kTileRows;
constexpr int kRowsAtOnce = 4;

template <class acc>
__device__ __forceinline__ acc exp_of(acc x) {
  return std::exp(x);
}

// Two sums as one. An empty one (max = -inf) adds nothing; NaN stays.
template <class acc>
__device__ __forceinline__ LogSum<acc> merged(LogSum<acc> a, LogSum<acc> b) {
  const acc max = b.max > a.max || b.max != b.max ? b.max : a.max;
  if (max == static_cast<acc>(-HUGE_VAL)) return {max, acc(0)};
  return {max, a.sum * exp_of(a.max - max) + b.sum * exp_of(b.max - max)};
}

template <class acc>
__device__ __forceinline__ acc logarithm(LogSum<acc> total) {
  return total.max + std::log(total.sum);
}

// Rows per chunk: a multiple of a tile's rows at once, at most 128 chunks.
inline int64_t chunk_rows(int64_t samples) {
  constexpr int64_t least = kTileRows * kRowsAtOnce;
  const int64_t rows = (samples + 127) / 128;
  return (rows + least - 1) / least * least;
}

template <class T>
__global__ void __launch_bounds__(kOneToNThreads) one_to_n_columns_kernel(OneToN<T> in, int64_t rows_per_chunk,
                                                                          LogSum<acc_t<T>>* partials) {  // [chunks, C]
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  constexpr acc nothing = static_cast<acc>(-HUGE_VAL);
  const int lane = threadIdx.x % kTileLanes, group = threadIdx.x / kTileLanes;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kTileLanes + lane) * size;
  const int64_t begin = blockIdx.y * rows_per_chunk;
  const int64_t end = begin + rows_per_chunk < in.samples ? begin + rows_per_chunk : in.samples;
  LogSum<acc> mine[size];
  MK_UNROLL
  for (int i = 0; i < size; ++i) mine[i] = {nothing, acc(0)};

  if (column < in.classes) {
    const bool whole = column + size <= in.classes;
    const acc nan = static_cast<acc>(NAN);
    for (int64_t row = begin + group; row < end; row += kTileRows * kRowsAtOnce) {
      acc b[kRowsAtOnce][size];
      MK_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int64_t n = row + r * kTileRows;
        const bool inside = n < end;
        const int64_t y = inside ? in.target[n] : 0;
        const T* z = in.logits + (inside ? n : begin) * in.stride + column;
        Pack<T> pack;
        if (whole) {
          pack = load_pack(z, word_of(z));
        } else {
          MK_UNROLL
          for (int i = 0; i < size; ++i) pack.data[i] = column + i < in.classes ? z[i] : narrow<T>(0);
        }
        const acc poison = in.valid(y) ? acc(0) : nan;
        MK_UNROLL
        for (int i = 0; i < size; ++i) {
          const acc value = math::bounded_negative(widen(pack.data[i]) + poison, in.delta);
          b[r][i] = inside && y != column + i ? value : nothing;
        }
      }
      MK_UNROLL
      for (int i = 0; i < size; ++i) {
        acc max = mine[i].max;
        MK_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) max = b[r][i] > max || b[r][i] != b[r][i] ? b[r][i] : max;
        if (max == nothing) continue;
        acc sum = mine[i].sum * exp_of(mine[i].max - max);
        MK_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) sum += exp_of(b[r][i] - max);
        mine[i] = {max, sum};
      }
    }
  }

  __shared__ LogSum<acc> tile[kTileRows][kTileLanes * size];
  MK_UNROLL
  for (int i = 0; i < size; ++i) tile[group][lane * size + i] = mine[i];
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileLanes * size;
  for (int c = threadIdx.x; c < kTileLanes * size; c += kOneToNThreads) {
    if (first + c >= in.classes) return;
    LogSum<acc> total = tile[0][c];
    for (int g = 1; g < kTileRows; ++g) total = merged(total, tile[g][c]);
    partials[blockIdx.y * in.classes + first + c] = total;
  }
}

// A_c from the chunks in their order: a thread per column.
template <class acc>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_finish_kernel(const LogSum<acc>* partials, int64_t chunks, int64_t classes, acc shift, acc* column) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kOneToNThreads + threadIdx.x;
  if (c >= classes) return;
  LogSum<acc> total{static_cast<acc>(-HUGE_VAL), acc(0)};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total = merged(total, partials[chunk * classes + c]);
  column[c] = logarithm(total) + shift;
}

// logsumexp of each row: a block per row. NaN where the row is not finite.
template <class T>
__global__ void __launch_bounds__(kOneToNThreads) one_to_n_rows_kernel(OneToN<T> in, acc_t<T>* normalizer) {  // [N]
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  const T* z = in.logits + static_cast<int64_t>(blockIdx.x) * in.stride;
  const int word = word_of(z);
  LogSum<acc> mine{static_cast<acc>(-HUGE_VAL), acc(0)};
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * size; i < in.classes; i += kOneToNThreads * size) {
    acc values[size], max = mine.max;
    Pack<T> pack;
    if (i + size <= in.classes) pack = load_pack(z + i, word);
    MK_UNROLL
    for (int j = 0; j < size; ++j) {
      if (i + size > in.classes && i + j < in.classes) pack.data[j] = z[i + j];
      values[j] = i + j < in.classes ? math::finite_or_nan(widen(pack.data[j])) : static_cast<acc>(-HUGE_VAL);
      max = values[j] > max || values[j] != values[j] ? values[j] : max;
    }
    if (math::is_masked_logit(max)) continue;  // nothing but masked classes so far
    acc sum = mine.sum * exp_of(mine.max - max);
    MK_UNROLL
    for (int j = 0; j < size; ++j) sum += exp_of(values[j] - max);
    mine = {max, sum};
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const LogSum<acc> other{__shfl_xor_sync(kWarp, mine.max, offset), __shfl_xor_sync(kWarp, mine.sum, offset)};
    // The lower lane first, so that both lanes of a pair get the same bits.
    mine = (threadIdx.x & offset) == 0 ? merged(mine, other) : merged(other, mine);
  }
  __shared__ LogSum<acc> warps[kTileRows];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kTileRows; ++w) mine = merged(mine, warps[w]);
  normalizer[blockIdx.x] = logarithm(mine);
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

// What backward needs of each sample: grad_i and s_i.
template <class T>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_share_kernel(OneToN<T> in, const acc_t<T>* column, const acc_t<T>* normalizer, acc_t<T>* share) {
  using acc = acc_t<T>;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kOneToNThreads + threadIdx.x;
  if (n >= in.samples) return;
  const int64_t y = in.target[n];
  share[n] = in.valid(y) ? math::negative_share(column[y], normalizer ? normalizer[n] : label_score(in, n, y))
                         : static_cast<acc>(NAN);
}

// S_c = sum of grad_i s_i over y_i = c and the shift of the exponent, `per_warp` classes to a warp. The samples of a
// class are added lane by lane of 32, whatever per_warp is.
template <class acc, int per_warp>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_totals_kernel(const int64_t* target, const acc* grad, const acc* share, const acc* column, int64_t samples,
                           int64_t classes, acc positive_shift,
                           LogSum<acc>* totals) {  // [C]: {shift, S}
  __shared__ int64_t targets[kOneToNThreads];
  __shared__ double values[kOneToNThreads];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kTileRows + warp) * per_warp;
  double sums[per_warp];
  MK_UNROLL
  for (int c = 0; c < per_warp; ++c) sums[c] = 0;
  for (int64_t begin = 0; begin < samples; begin += kOneToNThreads) {
    const int64_t n = begin + threadIdx.x;
    __syncthreads();
    targets[threadIdx.x] = n < samples ? target[n] : -1;
    values[threadIdx.x] = n < samples ? static_cast<double>(grad[n]) * share[n] : 0.0;
    __syncthreads();
    for (int i = lane; i < kOneToNThreads; i += 32) {
      MK_UNROLL
      for (int c = 0; c < per_warp; ++c) {
        if (targets[i] == first + c) sums[c] += values[i];
      }
    }
  }
  MK_UNROLL
  for (int c = 0; c < per_warp; ++c) {
    const double total = sum_lanes(sums[c]);
    if (lane != 0 || first + c >= classes) continue;
    const acc a = column[first + c];
    // A column that holds NaN gives NaN; without negatives nothing reads these numbers.
    totals[first + c] = {a - positive_shift, a != a ? a : static_cast<acc>(total)};
  }
}

template <class T>
__global__ void __launch_bounds__(kOneToNThreads)
    one_to_n_backward_kernel(OneToN<T> in,
                             const LogSum<acc_t<T>>* totals,  // [C]: {shift, S}
                             const acc_t<T>* normalizer,      // [N], or null without cross-entropy
                             const acc_t<T>* grad,            // [N]
                             const acc_t<T>* share,           // [N]
                             T* dlogits) {                    // [N, C]
  using acc = acc_t<T>;
  constexpr int size = Pack<T>::size;
  const int lane = threadIdx.x % kTileLanes, group = threadIdx.x / kTileLanes;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kTileLanes + lane) * size;
  if (column >= in.classes) return;
  const bool whole = column + size <= in.classes;
  LogSum<acc> total[size];
  MK_UNROLL
  for (int i = 0; i < size; ++i) total[i] = column + i < in.classes ? totals[column + i] : LogSum<acc>{0, 0};
  MK_UNROLL
  for (int r = 0; r < kRowsAtOnce; ++r) {
    const int64_t n = (static_cast<int64_t>(blockIdx.x) * kRowsAtOnce + r) * kTileRows + group;
    if (n >= in.samples) return;
    const T* z = in.logits + n * in.stride + column;
    T* dz = dlogits + n * in.classes + column;
    Pack<T> pack;
    if (whole) {
      pack = load_pack(z, word_of(z));
    } else {
      MK_UNROLL
      for (int i = 0; i < size; ++i) pack.data[i] = column + i < in.classes ? z[i] : narrow<T>(0);
    }
    const int64_t y = in.target[n];
    const acc g = grad[n], s = share[n], poison = in.valid(y) ? acc(0) : static_cast<acc>(NAN);
    MK_UNROLL
    for (int i = 0; i < size; ++i) {
      const acc value = math::finite_or_nan(widen(pack.data[i]));
      acc slope = y == column + i ? math::label_part(value, in.delta, g, normalizer ? acc(1) : s)
                                  : math::negative_gradient(value, in.delta, total[i].sum, total[i].max);
      if (normalizer) slope += math::softmax_part(value, normalizer[n], g, s);
      pack.data[i] = narrow<T>(slope + poison);
    }
    if (whole) {
      store_pack(dz, pack, word_of(dz));
    } else {
      MK_UNROLL
      for (int i = 0; i < size; ++i) {
        if (column + i < in.classes) dz[i] = pack.data[i];
      }
    }
  }
}

inline unsigned pieces(int64_t size, int64_t piece) { return static_cast<unsigned>((size + piece - 1) / piece); }

inline int64_t one_to_n_chunks(int64_t samples) { return samples == 0 ? 0 : pieces(samples, chunk_rows(samples)); }

template <class T, class Launch>
void one_to_n_forward(const Launch& launch, const OneToN<T>& in, bool positive, LogSum<acc_t<T>>* partials,
                      acc_t<T>* loss, acc_t<T>* column, acc_t<T>* normalizer) {
  using acc = acc_t<T>;
  const int64_t chunks = one_to_n_chunks(in.samples);
  if (chunks > 0) {
    const dim3 tiles(pieces(in.classes, kTileLanes * Pack<T>::size), static_cast<unsigned>(chunks));
    launch(one_to_n_columns_kernel<T>, tiles, kOneToNThreads, 0, in, chunk_rows(in.samples), partials);
  }
  launch(one_to_n_finish_kernel<acc>, pieces(in.classes, kOneToNThreads), kOneToNThreads, 0, partials, chunks,
         in.classes, positive ? in.delta : acc(0), column);
  if (in.samples == 0) return;
  if (normalizer) {
    launch(one_to_n_rows_kernel<T>, static_cast<unsigned>(in.samples), kOneToNThreads, 0, in, normalizer);
  }
  launch(one_to_n_loss_kernel<T>, pieces(in.samples, kOneToNThreads), kOneToNThreads, 0, in, column, normalizer, loss);
}

template <class T, class Launch>
void one_to_n_backward(const Launch& launch, const OneToN<T>& in, bool positive, const acc_t<T>* grad,
                       const acc_t<T>* column, const acc_t<T>* normalizer, acc_t<T>* share, LogSum<acc_t<T>>* totals,
                       T* dlogits) {
  using acc = acc_t<T>;
  if (in.samples == 0) return;
  launch(one_to_n_share_kernel<T>, pieces(in.samples, kOneToNThreads), kOneToNThreads, 0, in, column, normalizer,
         share);
  // Many classes: eight to a warp, so that the samples are read by an eighth of the blocks.
  const int per_warp = in.classes > 8192 ? 8 : 1;
  launch(per_warp == 8 ? one_to_n_totals_kernel<acc, 8> : one_to_n_totals_kernel<acc, 1>,
         pieces(in.classes, kTileRows * per_warp), kOneToNThreads, 0, in.target, grad, share, column, in.samples,
         in.classes, positive ? in.delta : acc(0), totals);
  const dim3 tiles(pieces(in.samples, kTileRows * kRowsAtOnce), pieces(in.classes, kTileLanes * Pack<T>::size));
  launch(one_to_n_backward_kernel<T>, tiles, kOneToNThreads, 0, in, totals, normalizer, grad, share, dlogits);
}

}  // namespace margin_kernels::cuda
