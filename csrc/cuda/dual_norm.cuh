// Dual norms of the rows of several layers in one launch, and their derivative.
//
// A table of the layers travels as a kernel parameter: nothing is copied to the device beforehand, and a captured graph
// holds it. Rows of up to 4 KiB take a warp each, longer ones a block of 256 threads for every 64 KiB; the partial sums
// of a row with several parts are added by a second, small kernel. Which thread adds what, and in which order, follows
// from the length of the row alone.
//
// Forward reads every gradient once and writes one number per row; backward reads once (p = 1: twice, to count ties)
// and writes once. Each thread has four loads of 16 bytes under way: 64 KiB per multiprocessor at four blocks, more
// than the 25 KiB that bandwidth times latency asks for on an H200.
#pragma once

#include <algorithm>
#include <vector>

#include "../math/dual_norm.h"
#include "device.cuh"

namespace margin_kernels::cuda {

using math::Norm;
using math::with_norm;

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kNormLoads = 4;
// Blocks per multiprocessor: four leave 64 registers for a thread, three 80. pow and float64 fit in neither.
template <Norm norm, class T>
constexpr int kNormBlocks = norm == Norm::GENERAL || std::is_same_v<T, double> ? 1
                            : norm == Norm::SQUARE || norm == Norm::SUM        ? 4
                                                                               : 3;
constexpr int64_t kWarpRowBytes = 4096, kPartBytes = 65536;

// One layer: row r = (r / inner, r % inner) over the batch dimensions, `length` elements in one dense run. Strides are
// in elements.
struct NormLayer {
  const void* data;
  void* slope;  // the gradient that backward writes
  int64_t outer_stride, inner_stride, slope_outer_stride, slope_inner_stride;
  int64_t length;
  int64_t first_block;    // of the launch
  int64_t first_partial;  // of its partial results, [rows, parts], where parts > 1
  int parts;              // blocks per row, 0: a warp per row
  int column;             // its place in norms [rows, columns]
};

constexpr int kNormLayers = 40;  // 4 KiB of parameters

struct NormTable {
  NormLayer layers[kNormLayers];
  int64_t rows, inner;
  int count, columns;

  // The layer that a block works on.
  __host__ __device__ int layer_of(int64_t block) const {
    int l = 0;
    while (l + 1 < count && block >= layers[l + 1].first_block) ++l;
    return l;
  }
};
static_assert(sizeof(NormTable) <= 3584, "leave room for the other parameters");

// sum of (|g_i| / scale)^q, or max |g_i|. The scale is 1 where the squares of all inputs fit in float64.
struct Partial {
  double scale, sum;
};

// Does a row need a scale? Powers up to 2 of float32 numbers fit in float64; nothing bounds those of float64, or a q.
template <Norm norm, class acc>
constexpr bool is_scaled =
    norm == Norm::GENERAL || (std::is_same_v<acc, double> && (norm == Norm::SQUARE || norm == Norm::THREE_HALVES));

template <class acc>
__device__ __forceinline__ acc larger_or_nan(acc a, acc b) {
  return b > a || b != b ? b : a;
}

// `sum` in units of scale^q, in units of top^q >= scale^q.
template <Norm norm>
__device__ __forceinline__ double rescaled(double sum, double scale, double top, double q) {
  if (sum == 0 || scale == top || !(fabs(sum) < HUGE_VAL)) return sum;
  return sum * math::power<norm>(scale / top, q);
}

// What one thread adds up.
template <Norm norm, class T>
struct Total {
  using acc = acc_t<T>;
  static constexpr int size = Pack<T>::size;
  double scale = is_scaled<norm, acc> ? 0 : 1, sum = 0;
  double q;
  acc largest = 0;

  __device__ explicit Total(double q_) : q(q_) {}

  template <int packs>
  __device__ __forceinline__ void add(const Pack<T> (&values)[packs]) {
    if constexpr (norm == Norm::MAX) {
      MK_UNROLL
      for (int i = 0; i < packs * size; ++i) {
        largest = larger_or_nan(largest, static_cast<acc>(fabs(widen(values[i / size].data[i % size]))));
      }
    } else if constexpr (is_scaled<norm, acc>) {
      add_scaled(values);
    } else if constexpr (std::is_same_v<acc, double>) {
      MK_UNROLL
      for (int i = 0; i < packs * size; ++i) sum += fabs(values[i / size].data[i % size]);
    } else {
      add_direct(values);
    }
  }

  // Powers of float32 in float32. A sum of 32 terms above 1e-35 has lost at most 1e-8 of itself to terms that were
  // rounded as denormal numbers, and one below 1e37 has not overflowed; any other is added again in float64.
  template <int packs>
  __device__ __forceinline__ void add_direct(const Pack<T> (&values)[packs]) {
    float parts[packs];
    MK_UNROLL
    for (int p = 0; p < packs; ++p) {
      parts[p] = 0;
      MK_UNROLL
      for (int i = 0; i < size; ++i) {
        parts[p] += math::power<norm>(static_cast<float>(fabs(widen(values[p].data[i]))), 0.0f);
      }
    }
    float total = parts[0];
    MK_UNROLL
    for (int p = 1; p < packs; ++p) total += parts[p];
    if (total >= 1e-35f && total <= 1e37f) {
      sum += total;
      return;
    }
    double wide = 0;
    MK_UNROLL
    for (int i = 0; i < packs * size; ++i) {
      const float m = fabs(widen(values[i / size].data[i % size]));
      if (m != 0) wide += math::power<norm>(static_cast<double>(m), 0.0);
    }
    sum += wide;
  }

  template <int packs>
  __device__ __forceinline__ void add_scaled(const Pack<T> (&values)[packs]) {
    acc top = 0;
    MK_UNROLL
    for (int i = 0; i < packs * size; ++i) {
      const acc m = fabs(widen(values[i / size].data[i % size]));
      if (m > top && m < static_cast<acc>(HUGE_VAL)) top = m;
    }
    if (top > scale) {
      sum = rescaled<norm>(sum, scale, top, q);
      scale = top;
    }
    const acc divisor = scale > 0 ? static_cast<acc>(scale) : acc(1);
    MK_UNROLL
    for (int i = 0; i < packs * size; ++i) {
      // Infinity and NaN stay what they are.
      sum += math::power<norm>(static_cast<acc>(fabs(widen(values[i / size].data[i % size])) / divisor),
                               static_cast<acc>(q));
    }
  }

  __device__ Partial partial() const { return {scale, norm == Norm::MAX ? static_cast<double>(largest) : sum}; }
};

// Elements [begin, end) of a row, shared by `threads` threads. begin is a multiple of a pack.
template <Norm norm, class T>
__device__ __forceinline__ Partial part_total(const T* row, int64_t begin, int64_t end, int thread, int threads,
                                              double q) {
  constexpr int size = Pack<T>::size;
  const int word = word_of(row);
  const int64_t stride = static_cast<int64_t>(threads) * size;
  Total<norm, T> total(q);
  int64_t i = begin + thread * size;
  for (; i + (kNormLoads - 1) * stride + size <= end; i += kNormLoads * stride) {
    Pack<T> packs[kNormLoads];
    MK_UNROLL
    for (int l = 0; l < kNormLoads; ++l) packs[l] = load_pack(row + i + l * stride, word);
    total.add(packs);
  }
  for (; i + size <= end; i += stride) {
    const Pack<T> packs[1] = {load_pack(row + i, word)};
    total.add(packs);
  }
  if (i < end) {
    Pack<T> packs[1];
    MK_UNROLL
    for (int j = 0; j < size; ++j) packs[0].data[j] = i + j < end ? row[i + j] : narrow<T>(0);
    total.add(packs);
  }
  return total.partial();
}

template <Norm norm, class acc>
__device__ __forceinline__ Partial reduce_warp(Partial mine, double q) {
  if constexpr (norm == Norm::MAX) {
    mine.sum = reduce_lanes(mine.sum, 32, [](double a, double b) { return larger_or_nan(a, b); });
  } else {
    if constexpr (is_scaled<norm, acc>) {
      const double top = reduce_lanes(mine.scale, 32, [](double a, double b) { return a > b ? a : b; });
      mine.sum = rescaled<norm>(mine.sum, mine.scale, top, q);
      mine.scale = top;
    }
    mine.sum = sum_lanes(mine.sum);
  }
  return mine;
}

// In warp 0; called by every thread of the block.
template <Norm norm, class acc>
__device__ __forceinline__ Partial reduce_block(Partial mine, double q) {
  __shared__ Partial warps[kNormWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  mine = reduce_warp<norm, acc>(mine, q);
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  if (warp == 0)
    mine = reduce_warp<norm, acc>(lane < kNormWarps ? warps[lane] : Partial{is_scaled<norm, acc> ? 0.0 : 1.0, 0.0}, q);
  return mine;
}

template <Norm norm>
__device__ __forceinline__ double norm_of_total(Partial total, double q) {
  if (!(total.sum < HUGE_VAL)) return total.sum;
  return total.scale * math::root<norm>(total.sum, q);
}

// Where a block or warp works: row, part, and elements [begin, end). `row` may lie behind the last one.
struct NormPlace {
  int64_t row, begin, end;
  int part;
};

template <class T>
__device__ __forceinline__ NormPlace place_of(const NormTable& table, const NormLayer& layer) {
  const int64_t block = blockIdx.x - layer.first_block;
  if (layer.parts == 0) return {block * kNormWarps + threadIdx.x / 32, 0, layer.length, 0};
  constexpr int64_t part_length = kPartBytes / sizeof(T);
  const int part = static_cast<int>(block % layer.parts);
  const int64_t begin = part * part_length, end = begin + part_length;
  return {block / layer.parts, begin, end < layer.length ? end : layer.length, part};
}

__device__ __forceinline__ int64_t row_offset(const NormTable& table, int64_t row, int64_t outer, int64_t inner) {
  return row / table.inner * outer + row % table.inner * inner;
}

template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<norm, T>)
    dual_norm_kernel(const __grid_constant__ NormTable table, double q,
                     acc_t<T>* norms,      // [rows, columns]
                     Partial* partials) {  // of the layers with parts > 1
  using acc = acc_t<T>;
  const NormLayer& layer = table.layers[table.layer_of(blockIdx.x)];
  const NormPlace at = place_of<T>(table, layer);
  if (layer.parts == 0 && at.row >= table.rows) return;  // a whole warp; no barrier follows
  const T* row = static_cast<const T*>(layer.data) + row_offset(table, at.row, layer.outer_stride, layer.inner_stride);
  acc* norm_of_row = norms + at.row * table.columns + layer.column;
  if (layer.parts == 0) {
    const int lane = threadIdx.x % 32;
    const Partial total = reduce_warp<norm, acc>(part_total<norm>(row, 0, layer.length, lane, 32, q), q);
    if (lane == 0) *norm_of_row = static_cast<acc>(norm_of_total<norm>(total, q));
    return;
  }
  const Partial total = reduce_block<norm, acc>(
      part_total<norm>(row, at.begin, at.end, static_cast<int>(threadIdx.x), kNormThreads, q), q);
  if (threadIdx.x != 0) return;
  if (layer.parts == 1) {
    *norm_of_row = static_cast<acc>(norm_of_total<norm>(total, q));
  } else {
    partials[layer.first_partial + at.row * layer.parts + at.part] = total;
  }
}

// The second stage: a warp per row with several parts. Reads 16 bytes per 64 KiB of gradient.
template <Norm norm, class acc>
__global__ void __launch_bounds__(kNormThreads, 1)
    dual_norm_finish_kernel(const __grid_constant__ NormTable table, double q, acc* norms, const Partial* partials) {
  const NormLayer& layer = table.layers[table.layer_of(blockIdx.x)];
  const int64_t row = (blockIdx.x - layer.first_block) * kNormWarps + threadIdx.x / 32;
  if (row >= table.rows) return;
  const int lane = threadIdx.x % 32;
  const Partial* parts = partials + layer.first_partial + row * layer.parts;
  Partial total{is_scaled<norm, acc> ? 0.0 : 1.0, 0.0};
  for (int p = lane; p < layer.parts; p += 32) {
    const Partial part = parts[p];
    if constexpr (norm == Norm::MAX) {
      total.sum = larger_or_nan(total.sum, part.sum);
    } else {
      const double top = part.scale > total.scale ? part.scale : total.scale;
      total.sum = rescaled<norm>(total.sum, total.scale, top, q) + rescaled<norm>(part.sum, part.scale, top, q);
      total.scale = top;
    }
  }
  total = reduce_warp<norm, acc>(total, q);
  if (lane == 0) norms[row * table.columns + layer.column] = static_cast<acc>(norm_of_total<norm>(total, q));
}

// grad * d norm / d g for the entries of one row.
template <Norm norm, class T>
struct Slope {
  using acc = acc_t<T>;
  acc value, grad, up, reciprocal;
  double q;

  // |g| <= norm, so |g| / norm stays in [0, 1] whatever the scale; `up` keeps its reciprocal in the range of float32.
  __device__ Slope(acc value_, acc grad_, double q_, int64_t ties) : value(value_), grad(grad_), up(1), q(q_) {
    if constexpr (norm == Norm::MAX) {
      grad = value == value ? static_cast<acc>(static_cast<double>(grad) / static_cast<double>(ties)) : value;
    } else if constexpr (std::is_same_v<acc, float>) {
      up = value < 1e-20f ? 0x1p64f : (value > 1e20f ? 0x1p-64f : 1.0f);
      reciprocal = static_cast<float>(1.0 / static_cast<double>(value) / up);
    }
  }

  __device__ __forceinline__ acc operator()(acc g) const {
    if (value == acc(0)) return acc(0);
    if constexpr (norm == Norm::MAX) {
      return fabs(g) == value || value != value ? (g < acc(0) ? -grad : grad) : acc(0);
    } else if constexpr (norm == Norm::SUM || std::is_same_v<acc, double>) {
      return math::slope<norm>(g, value, static_cast<acc>(q)) * grad;
    } else {
      float ratio = fabsf(g) * up * reciprocal;
      if constexpr (norm == Norm::THREE_HALVES) ratio = sqrtf(ratio);
      if constexpr (norm == Norm::GENERAL) {
        // Rounding of the ratio grows with the exponent, and below 1e-38 it has few digits.
        const bool precise = q > 3 || (ratio < 1e-30f && g != 0.0f);
        ratio = precise ? static_cast<float>(pow(static_cast<double>(fabsf(g)) / value, q - 1))
                        : powf(ratio, static_cast<float>(q - 1));
      }
      return copysignf(ratio, g) * grad;
    }
  }
};

template <class T>
__device__ __forceinline__ int64_t count_ties(const T* row, int64_t begin, int64_t end, int thread, int threads,
                                              acc_t<T> value) {
  constexpr int size = Pack<T>::size;
  const int word = word_of(row);
  int64_t ties = 0;
  for (int64_t i = begin + thread * size; i < end; i += threads * size) {
    if (i + size <= end) {
      const Pack<T> pack = load_pack(row + i, word);
      MK_UNROLL
      for (int j = 0; j < size; ++j) ties += fabs(widen(pack.data[j])) == value;
    } else {
      for (int64_t j = i; j < end; ++j) ties += fabs(widen(row[j])) == value;
    }
  }
  return ties;
}

__device__ __forceinline__ int64_t sum_block(int64_t value) {
  __shared__ int64_t warps[kNormWarps];
  value = sum_lanes(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < kNormWarps; ++w) total += warps[w];
  return total;
}

// How many entries of each part attain the maximum, for rows with several parts.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    dual_norm_ties_kernel(const __grid_constant__ NormTable table,
                          const acc_t<T>* norms,  // [rows, columns]
                          int64_t* ties) {        // [rows, parts] of the layers with parts > 1
  const NormLayer& layer = table.layers[table.layer_of(blockIdx.x)];
  if (layer.parts < 2) return;
  const NormPlace at = place_of<T>(table, layer);
  const T* row = static_cast<const T*>(layer.data) + row_offset(table, at.row, layer.outer_stride, layer.inner_stride);
  const acc_t<T> value = norms[at.row * table.columns + layer.column];
  const int64_t count =
      sum_block(count_ties(row, at.begin, at.end, static_cast<int>(threadIdx.x), kNormThreads, value));
  if (threadIdx.x == 0) ties[layer.first_partial + at.row * layer.parts + at.part] = count;
}

template <Norm norm, class T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks<norm, T>)
    dual_norm_backward_kernel(const __grid_constant__ NormTable table, double q,
                              const acc_t<T>* norms,          // [rows, columns]
                              const acc_t<T>* grads,          // [rows, columns]
                              const int64_t* partial_ties) {  // [rows, parts] of the layers with parts > 1
  constexpr int size = Pack<T>::size;
  const NormLayer& layer = table.layers[table.layer_of(blockIdx.x)];
  const NormPlace at = place_of<T>(table, layer);
  if (layer.parts == 0 && at.row >= table.rows) return;
  const T* row = static_cast<const T*>(layer.data) + row_offset(table, at.row, layer.outer_stride, layer.inner_stride);
  T* to = static_cast<T*>(layer.slope) + row_offset(table, at.row, layer.slope_outer_stride, layer.slope_inner_stride);
  const int threads = layer.parts == 0 ? 32 : kNormThreads, thread = static_cast<int>(threadIdx.x) % threads;
  const int64_t cell = at.row * table.columns + layer.column;

  int64_t ties = 1;
  if constexpr (norm == Norm::MAX) {
    if (layer.parts == 0) {
      ties = sum_lanes(count_ties(row, at.begin, at.end, thread, threads, norms[cell]));
    } else if (layer.parts == 1) {
      ties = sum_block(count_ties(row, at.begin, at.end, thread, threads, norms[cell]));
    } else {
      ties = 0;
      for (int p = thread; p < layer.parts; p += threads) {
        ties += partial_ties[layer.first_partial + at.row * layer.parts + p];
      }
      ties = sum_block(ties);
    }
  }

  const Slope<norm, T> slope(norms[cell], grads[cell], q, ties);
  const int word = word_of(row), word_to = word_of(to);
  const int64_t stride = static_cast<int64_t>(threads) * size;
  const auto store = [&](int64_t i, Pack<T> pack) {
    MK_UNROLL
    for (int j = 0; j < size; ++j) pack.data[j] = narrow<T>(slope(widen(pack.data[j])));
    store_pack(to + i, pack, word_to);
  };
  int64_t i = at.begin + thread * size;
  for (; i + (kNormLoads - 1) * stride + size <= at.end; i += kNormLoads * stride) {
    Pack<T> packs[kNormLoads];
    MK_UNROLL
    for (int l = 0; l < kNormLoads; ++l) packs[l] = load_pack(row + i + l * stride, word);
    MK_UNROLL
    for (int l = 0; l < kNormLoads; ++l) store(i + l * stride, packs[l]);
  }
  for (; i + size <= at.end; i += stride) store(i, load_pack(row + i, word));
  for (; i < at.end; ++i) to[i] = narrow<T>(slope(widen(row[i])));
}

// The launches for a list of layers: as many tables as needed, and for each the layers whose rows have several parts.
struct NormPlan {
  struct Launches {
    NormTable table, split;
    int64_t blocks, split_blocks;
  };
  std::vector<Launches> launches;
  int64_t partials = 0;  // entries of the workspace, 16 bytes each

  NormPlan(const std::vector<NormLayer>& layers, int64_t rows, int64_t inner, int columns, int element_size) {
    if (rows == 0) return;
    for (NormLayer layer : layers) {
      if (launches.empty() || launches.back().table.count == kNormLayers) {
        launches.push_back({});
        for (NormTable* table : {&launches.back().table, &launches.back().split}) {
          table->rows = rows;
          table->inner = inner;
          table->columns = columns;
        }
      }
      Launches& last = launches.back();
      const int64_t bytes = layer.length * element_size;
      layer.parts = bytes <= kWarpRowBytes ? 0 : static_cast<int>((bytes + kPartBytes - 1) / kPartBytes);
      layer.first_block = last.blocks;
      layer.first_partial = partials;
      last.table.layers[last.table.count++] = layer;
      const int64_t warp_blocks = (rows + kNormWarps - 1) / kNormWarps;
      last.blocks += layer.parts == 0 ? warp_blocks : rows * layer.parts;
      if (layer.parts < 2) continue;
      partials += rows * layer.parts;
      layer.first_block = last.split_blocks;
      last.split.layers[last.split.count++] = layer;
      last.split_blocks += warp_blocks;
    }
  }

  // A grid has at most 2^31 - 1 blocks.
  bool fits() const {
    return std::all_of(launches.begin(), launches.end(), [](const Launches& l) { return l.blocks <= 0x7fffffff; });
  }
};

template <class T, class Launch>
void dual_norm_forward(const Launch& launch, const NormPlan& plan, double p, acc_t<T>* norms, Partial* partials) {
  const double q = math::dual_exponent(p);
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    for (const auto& l : plan.launches) {
      launch(dual_norm_kernel<norm, T>, static_cast<unsigned>(l.blocks), kNormThreads, 0, l.table, q, norms, partials);
      if (l.split_blocks == 0) continue;
      launch(dual_norm_finish_kernel<norm, acc_t<T>>, static_cast<unsigned>(l.split_blocks), kNormThreads, 0, l.split,
             q, norms, partials);
    }
  });
}

template <class T, class Launch>
void dual_norm_backward(const Launch& launch, const NormPlan& plan, double p, const acc_t<T>* norms,
                        const acc_t<T>* grads, int64_t* ties) {
  const double q = math::dual_exponent(p);
  with_norm(p, [&](auto tag) {
    constexpr Norm norm = decltype(tag)::value;
    for (const auto& l : plan.launches) {
      const auto blocks = static_cast<unsigned>(l.blocks);
      if (norm == Norm::MAX && l.split_blocks > 0) {
        launch(dual_norm_ties_kernel<T>, blocks, kNormThreads, 0, l.table, norms, ties);
      }
      launch(dual_norm_backward_kernel<norm, T>, blocks, kNormThreads, 0, l.table, q, norms, grads, ties);
    }
  });
}

}  // namespace margin_kernels::cuda
