// Distance, hinge, clip and aggregation: one launch each way over gap [N, k] and norm [N, k, L].
//
// `width` neighbouring lanes work on one sample and share its competitors: one lane for few of them, up to a warp for
// many. Blocks of 128 threads: with loops this short the launch is what one waits for. Numbers read and written:
//   forward    N k (L + 1)        N (k L + 1)
//   backward   N (k L + k + 1)    N k (L + 1)
#pragma once

#include "../math/margin_hinge.h"
#include "device.cuh"

namespace margin_kernels::cuda {

using math::Aggregation;

template <class T>
struct MarginHinge {
  const T* gap;       // [N, k]
  const T* norm;      // [N, k, L]
  const T* gamma;     // [L]
  const T* cap;       // [L] or null: infinity
  const T* weight;    // [L] or null: 1
  const T* min_norm;  // [L] or null: none
  int64_t rows;
  int k, layers;
  T eps;
  Aggregation aggregation;
  bool mean_over_layers;  // weights divided by their sum
};

constexpr int kMarginHingeThreads = 128;

// What the lanes of one sample see.
template <class T>
struct Sample {
  const MarginHinge<T>& in;
  int64_t n;
  int lane, width;
  T scale;  // 1 / sum of the weights for the mean over layers

  __device__ Sample(const MarginHinge<T>& in_, int width_)
      : in(in_),
        n((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / width_),
        lane(threadIdx.x % width_),
        width(width_),
        scale(1) {
    if (in.mean_over_layers) {
      T total = 0;
      for (int l = 0; l < in.layers; ++l) total += in.weight ? in.weight[l] : T(1);
      scale = 1 / total;
    }
  }

  // Lanes behind the last sample stay for the shuffles: they repeat it and write nothing.
  __device__ bool beyond() {
    if (n < in.rows) return false;
    n = in.rows - 1;
    return true;
  }

  __device__ T cap(int l) const { return in.cap ? in.cap[l] : static_cast<T>(HUGE_VAL); }
  __device__ T weight(int l) const {
    const T own = in.weight ? in.weight[l] : T(1);
    const bool legal = math::legal(in.gamma[l], cap(l), own) && (in.min_norm == nullptr || in.min_norm[l] >= T(0));
    return legal ? own * scale : static_cast<T>(NAN);
  }
  __device__ int64_t place(int j, int l) const { return (n * in.k + j) * in.layers + l; }
  __device__ T distance(int j, int l) const {
    return math::signed_distance(in.gap[n * in.k + j], in.norm[place(j, l)], in.eps);
  }

  __device__ bool left_out(int j, int l) const {
    // No norm is below -inf.
    const T least = in.min_norm ? in.min_norm[l] : -static_cast<T>(HUGE_VAL);
    return math::left_out(in.gap[n * in.k + j], in.norm[place(j, l)], least);
  }

  // The competitor with the smallest distance, the first of equals; the first NaN where there is one; k where all are
  // left out.
  __device__ int nearest(int l, T& smallest) const {
    const auto comes_first = [](T a, int i, T b, int j) {
      if (a != a || b != b) return a != a && (b == b || i < j);
      return a < b || (a == b && i < j);
    };
    smallest = static_cast<T>(HUGE_VAL);
    int best = in.k;
    for (int j = lane; j < in.k; j += width) {
      if (left_out(j, l)) continue;
      const T d = distance(j, l);
      if (comes_first(d, j, smallest, best)) {
        smallest = d;
        best = j;
      }
    }
    for (int offset = width / 2; offset > 0; offset /= 2) {
      const T d = __shfl_xor_sync(kWarp, smallest, offset);
      const int j = __shfl_xor_sync(kWarp, best, offset);
      if (comes_first(d, j, smallest, best)) {
        smallest = d;
        best = j;
      }
    }
    return best;
  }

  // Over the pairs that are not left out; `count` of them.
  __device__ T mean_distance(int l, int& count) const {
    T total = 0;
    count = 0;
    for (int j = lane; j < in.k; j += width) {
      if (left_out(j, l)) continue;
      total += distance(j, l);
      ++count;
    }
    total = sum_lanes(total, width);
    count = sum_lanes(count, width);
    return count > 0 ? total / count : T(0);
  }

  __device__ T term(T distance, int l) const { return math::term(distance, in.gamma[l], cap(l)); }
  __device__ bool active(T distance, int l) const { return math::active(distance, in.gamma[l], cap(l)); }

  __device__ T layer_term(int l) const {
    if (in.aggregation == Aggregation::MAX) {
      T smallest;
      return nearest(l, smallest) == in.k ? T(0) : term(smallest, l);
    }
    if (in.aggregation == Aggregation::MEAN_DISTANCE) {
      int count;
      const T mean = mean_distance(l, count);
      return count == 0 ? T(0) : term(mean, l);
    }
    T total = 0;
    for (int j = lane; j < in.k; j += width) {
      if (!left_out(j, l)) total += term(distance(j, l), l);
    }
    total = sum_lanes(total, width);
    return in.aggregation == Aggregation::SUM ? total : total / in.k;
  }
};

template <class T>
__global__ void __launch_bounds__(kMarginHingeThreads, 1) margin_hinge_kernel(MarginHinge<T> in, int width,
                                                                              T* loss,        // [N]
                                                                              T* distance) {  // [N, k, L]
  Sample<T> sample(in, width);
  const bool beyond = sample.beyond();
  T total = 0;
  for (int l = 0; l < in.layers; ++l) total += sample.weight(l) * sample.layer_term(l);
  if (beyond) return;
  if (sample.lane == 0) loss[sample.n] = total;
  for (int j = sample.lane; j < in.k; j += width) {
    for (int l = 0; l < in.layers; ++l) distance[sample.place(j, l)] = sample.distance(j, l);
  }
}

// With c the weight of an active term:  dgap[n,j] = sum_l grad c / e,  dnorm = -grad c gap / e^2,  e = eps + norm.
template <class T>
__global__ void __launch_bounds__(kMarginHingeThreads, 1) margin_hinge_backward_kernel(MarginHinge<T> in, int width,
                                                                                       const T* grad,  // [N]
                                                                                       T* dgap,        // [N, k]
                                                                                       T* dnorm) {  // [N, k, L] or null
  Sample<T> sample(in, width);
  const bool beyond = sample.beyond();
  const T g = grad[sample.n];
  for (int l = 0; l < in.layers; ++l) {
    const T weight = sample.weight(l);
    T share = in.aggregation == Aggregation::MAX || in.aggregation == Aggregation::SUM ? weight : weight / in.k;
    int only = -1;       // the one competitor with a slope, for the maximum
    bool every = false;  // all that are not left out have one, for the mean distance
    if (in.aggregation == Aggregation::MAX) {
      T smallest;
      const int j = sample.nearest(l, smallest);
      if (j < in.k && sample.active(smallest, l)) only = j;
    } else if (in.aggregation == Aggregation::MEAN_DISTANCE) {
      int count;
      const T mean = sample.mean_distance(l, count);
      every = count > 0 && sample.active(mean, l);
      if (every) share = weight / count;
    }
    if (beyond) continue;
    for (int j = sample.lane; j < in.k; j += width) {
      bool active = every || j == only;
      if (in.aggregation == Aggregation::SUM || in.aggregation == Aggregation::MEAN) {
        active = sample.active(sample.distance(j, l), l);
      }
      // An inactive term has slope 0 even where the norm is 0 or NaN, and so has one of weight 0.
      active = active && share != T(0) && !sample.left_out(j, l);
      if (std::fabs(in.gap[sample.n * in.k + j]) == static_cast<T>(HUGE_VAL)) active = false;
      const int64_t row = sample.n * in.k + j;
      const T norm = in.norm[sample.place(j, l)], coefficient = g * share;
      const T slope = active ? math::gap_slope(coefficient, norm, in.eps) : T(0);
      dgap[row] = l == 0 ? slope : dgap[row] + slope;
      if (dnorm) {
        dnorm[sample.place(j, l)] = active ? math::norm_slope(coefficient, in.gap[row], norm, in.eps) : T(0);
      }
    }
  }
}

// Lanes per sample: about four competitors each. Depends on k only, and so does the order of the sums.
inline int margin_hinge_width(int k) {
  int width = 1;
  while (width < 32 && 4 * width < k) width *= 2;
  return width;
}

inline unsigned margin_hinge_blocks(int64_t rows, int width) {
  return static_cast<unsigned>((rows * width + kMarginHingeThreads - 1) / kMarginHingeThreads);
}

template <class T, class Launch>
void margin_hinge_forward(const Launch& launch, const MarginHinge<T>& in, T* loss, T* distance) {
  if (in.rows == 0) return;
  const int width = margin_hinge_width(in.k);
  launch(margin_hinge_kernel<T>, margin_hinge_blocks(in.rows, width), kMarginHingeThreads, 0, in, width, loss,
         distance);
}

template <class T, class Launch>
void margin_hinge_backward(const Launch& launch, const MarginHinge<T>& in, const T* grad, T* dgap, T* dnorm) {
  if (in.rows == 0) return;
  const int width = margin_hinge_width(in.k);
  launch(margin_hinge_backward_kernel<T>, margin_hinge_blocks(in.rows, width), kMarginHingeThreads, 0, in, width, grad,
         dgap, dnorm);
}

}  // namespace margin_kernels::cuda
