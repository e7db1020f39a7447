// One row of logits z: [C] contiguous, label y. Included once per instruction set.
//
// Forward reads the row twice while it lies in the cache: once for the competitors, once for the sum of exponentials.
// Backward reads it once and writes the gradient once.

#include "sum_exp.h"

namespace margin_kernels::MK_ISA {

// Beyond this many competitors a partial sort of all classes is cheaper than keeping a sorted list.
constexpr int64_t kListed = 32;

template <class acc>
struct Best {
  acc value;
  int64_t index;
};

// The first of the largest of z[begin, end), merged into `best`; adds z * 0 to `poison`: NaN if any is not finite.
template <class scalar_t>
MK_FN void scan_largest(const scalar_t* z, int64_t begin, int64_t end, Best<typename Lane<scalar_t>::acc>& best,
                        typename Lane<scalar_t>::acc& poison) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  using integers = typename L::integers;
  constexpr int64_t W = L::width;
  const auto consider = [&](acc value, int64_t index) MK_TARGET {
    if (math::comes_before(value, index, best.value, best.index)) best = {value, index};
  };
  int64_t i = begin;
  if (end - begin >= W) {
    vector largest = load(z + i), zero = largest * acc(0);
    integers step{}, where{};  // in vectors after `begin`
    i += W;
    vector largest2 = largest;
    integers where2{};
    for (; i + 2 * W <= end; i += 2 * W) {
      const vector v = load(z + i), w = load(z + i + W);
      step += 1;
      const integers up = v > largest;
      largest = up ? v : largest;
      where = up ? step : where;
      step += 1;
      const integers up2 = w > largest2;
      largest2 = up2 ? w : largest2;
      where2 = up2 ? step : where2;
      zero += v * acc(0) + w * acc(0);
    }
    for (; i + W <= end; i += W) {
      const vector v = load(z + i);
      step += 1;
      const integers up = v > largest;
      largest = up ? v : largest;
      where = up ? step : where;
      zero += v * acc(0);
    }
    for (int64_t lane = 0; lane < W; ++lane) {
      consider(largest[lane], begin + where[lane] * W + lane);
      consider(largest2[lane], begin + where2[lane] * W + lane);
      poison += zero[lane];
    }
  }
  for (; i < end; ++i) {
    const acc value = static_cast<acc>(z[i]);
    poison += value * acc(0);
    consider(value, i);
  }
}

// The largest of each of 2 W lanes over the whole vectors of z[begin, end); adds z * 0 of all elements to `poison`.
template <class scalar_t>
MK_FN void scan_lanes(const scalar_t* z, int64_t begin, int64_t end, typename Lane<scalar_t>::vector (&largest)[2],
                      typename Lane<scalar_t>::acc& poison) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  vector zero{};
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W) {
    const vector v = load(z + i), w = load(z + i + W);
    largest[0] = larger(v, largest[0]);
    largest[1] = larger(w, largest[1]);
    zero += v * acc(0) + w * acc(0);
  }
  for (int64_t lane = 0; lane < W; ++lane) poison += zero[lane];
  for (; i < end; ++i) poison += static_cast<acc>(z[i]) * acc(0);
}

// The k-th largest of the lanes (a smaller one where some are equal): at least k elements are not below it.
template <class vector, class acc>
MK_FN acc kth_largest(vector (&lanes)[2], int64_t k, acc lowest) {
  acc bound = lowest;
  for (int64_t j = 0; j < k; ++j) {
    bound = largest_lane(larger(lanes[0], lanes[1]));
    lanes[0] = lanes[0] >= bound ? vector{} + lowest : lanes[0];
    lanes[1] = lanes[1] >= bound ? vector{} + lowest : lanes[1];
  }
  return bound;
}

// Merges z[begin, end) into the sorted list best[0, k): a class enters where it beats the last one. Classes not above
// `bound` are known not to be among the k.
template <class scalar_t>
MK_FN void scan_list(const scalar_t* z, int64_t begin, int64_t end, int64_t k, typename Lane<scalar_t>::acc bound,
                     Best<typename Lane<scalar_t>::acc>* best) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  const auto insert = [&](acc value, int64_t index) MK_TARGET {
    if (!(value > best[k - 1].value)) return;  // classes come in increasing order: an equal one stays behind
    int64_t j = k - 1;
    for (; j > 0 && value > best[j - 1].value; --j) best[j] = best[j - 1];
    best[j] = {value, index};
  };
  const auto threshold = [&]() MK_TARGET { return best[k - 1].value > bound ? best[k - 1].value : bound; };
  int64_t i = begin;
  for (; i + 4 * W <= end; i += 4 * W) {
    const vector v[4] = {load(z + i), load(z + i + W), load(z + i + 2 * W), load(z + i + 3 * W)};
    if (lanes_above(larger(larger(v[0], v[1]), larger(v[2], v[3])), threshold()) == 0) continue;
    for (int64_t part = 0; part < 4; ++part) {
      for (uint32_t bits = lanes_above(v[part], threshold()); bits != 0; bits &= bits - 1) {
        const int64_t at = i + part * W + __builtin_ctz(bits);
        insert(static_cast<acc>(z[at]), at);
      }
    }
  }
  for (; i < end; ++i) {
    if (static_cast<acc>(z[i]) > threshold()) insert(static_cast<acc>(z[i]), i);
  }
}

template <class scalar_t>
MK_TARGET void forward_rows(const CompetitorsForward<scalar_t>& at, int64_t begin, int64_t end,
                            std::atomic<int64_t>* bad) {
  using acc = typename Lane<scalar_t>::acc;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity(), nan = std::numeric_limits<acc>::quiet_NaN();
  const int64_t classes = at.classes, k = at.k;
  std::vector<Best<acc>> list(k > kListed ? 0 : k);
  std::vector<int64_t> order(k > kListed ? classes : 0);
  for (int64_t n = begin; n < end; ++n) {
    const scalar_t* z = at.logits + n * at.row_stride;
    const int64_t y = at.target[n * at.target_stride];
    int64_t* index = at.index + n * k;
    acc *gap = at.gap + n * k, poison = 0, max;
    if (y < 0 || y >= classes) {
      bad->store(n);
      return;
    }
    const acc z_label = static_cast<acc>(z[y]);
    poison += z_label * acc(0);
    if (k > kListed) {
      for (int64_t i = 0; i < classes; ++i) poison += static_cast<acc>(z[i]) * acc(0);
      if (poison == 0) {
        std::iota(order.begin(), order.end(), int64_t{0});
        order.erase(order.begin() + y);
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t i, int64_t j) {
          return math::comes_before(static_cast<acc>(z[i]), i, static_cast<acc>(z[j]), j);
        });
        std::copy_n(order.begin(), k, index);
        order.resize(classes);
      }
    } else {
      std::fill(list.begin(), list.end(), Best<acc>{lowest, classes});
      if (k == 1) {
        scan_largest(z, 0, y, list[0], poison);
        scan_largest(z, y + 1, classes, list[0], poison);
      } else {
        // Two reads of a row that lies in the cache: the first finds a bound that all but a few classes stay below, so
        // that the second seldom leaves its vector loop.
        typename Lane<scalar_t>::vector lanes[2] = {load_part(z, 0, lowest), load_part(z, 0, lowest)};
        scan_lanes(z, 0, y, lanes, poison);
        scan_lanes(z, y + 1, classes, lanes, poison);
        const acc bound = std::nextafter(kth_largest(lanes, k, lowest), lowest);
        scan_list(z, 0, y, k, bound, list.data());
        scan_list(z, y + 1, classes, k, bound, list.data());
      }
      for (int64_t j = 0; j < k; ++j) index[j] = list[j].index;
    }
    if (!(poison == 0)) {
      for (int64_t j = 0; j < k; ++j) {
        index[j] = j < y ? j : j + 1;
        gap[j] = nan;
      }
      at.nll[n] = at.normalizer[2 * n] = at.normalizer[2 * n + 1] = nan;
      continue;
    }
    for (int64_t j = 0; j < k; ++j) gap[j] = static_cast<acc>(z[index[j]]) - z_label;
    const acc strongest = static_cast<acc>(z[index[0]]);
    max = z_label > strongest ? z_label : strongest;
    const acc log_sum = static_cast<acc>(std::log(sum_exp(z, classes, max)));
    at.normalizer[2 * n] = max;
    at.normalizer[2 * n + 1] = log_sum;
    at.nll[n] = math::negative_log_likelihood(z_label, max, log_sum);
  }
}

// dz = grad_nll softmax everywhere, then the k + 1 entries of label and competitors again from float32
template <class scalar_t>
MK_TARGET void backward_rows(const CompetitorsBackward<scalar_t>& at, int64_t begin, int64_t end) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  const int64_t classes = at.classes, k = at.k;
  for (int64_t n = begin; n < end; ++n) {
    const scalar_t* z = at.logits + n * at.row_stride;
    scalar_t* dz = at.dlogits + n * classes;
    const int64_t y = at.target[n * at.target_stride];
    const int64_t* index = at.index + n * k;
    const acc max = at.normalizer[2 * n], log_sum = at.normalizer[2 * n + 1];
    const acc grad_nll = at.grad_nll ? at.grad_nll[n * at.nll_stride] : acc(0);
    if (std::isnan(log_sum)) {
      std::fill_n(dz, classes, static_cast<scalar_t>(log_sum));
      continue;
    }
    if (grad_nll == 0) {
      std::memset(static_cast<void*>(dz), 0, classes * sizeof(scalar_t));
    } else {
      // exp(z - max - log_sum) = exp(z - max) / sum: the argument stays <= 0 without rounding
      const acc factor = grad_nll * std::exp(-log_sum);
      int64_t i = 0;
      for (; i + W <= classes; i += W) store(dz + i, vector(exp_nonpositive(load(z + i) - max) * factor));
      if (i < classes) {
        store_part(dz + i, vector(exp_nonpositive(load_part(z + i, classes - i, max) - max) * factor), classes - i);
      }
    }
    acc total = 0;
    for (int64_t j = 0; j < k && at.grad_gap; ++j) {
      const acc grad_gap = at.grad_gap[n * at.gap_strides[0] + j * at.gap_strides[1]];
      const acc p = grad_nll == 0 ? acc(0) : math::softmax(static_cast<acc>(z[index[j]]), max, log_sum);
      dz[index[j]] = static_cast<scalar_t>(math::competitor_gradient(p, grad_nll, grad_gap));
      total += grad_gap;
    }
    const acc p = grad_nll == 0 ? acc(0) : math::softmax(static_cast<acc>(z[y]), max, log_sum);
    dz[y] = static_cast<scalar_t>(math::label_gradient(p, grad_nll, total));
  }
}

}  // namespace margin_kernels::MK_ISA
