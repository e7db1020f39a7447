// One row of logits z: [C] contiguous, label y. Included once per instruction set.
//
// Forward reads the row twice while it lies in the cache: once for the competitors, once for the sum of exponentials.
// Backward reads it once and writes the gradient once.

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

// Lane i of the vector that begins at class `begin` is set to `value` where begin + i is the label.
template <class L>
MK_FN typename L::vector replace_label(typename L::vector v, int64_t begin, int64_t y, typename L::acc value) {
  using integers = typename L::integers;
  using integer = std::remove_reference_t<decltype(integers{}[0])>;
  integers lane{};
  for (int64_t i = 0; i < L::width; ++i) lane[i] = static_cast<integer>(i);
  return lane == static_cast<integer>(y - begin) ? typename L::vector{} + value : v;
}

// The list best[0, k) of the largest competitors in a row of at most one vector (best[0] for k = 0 too), and S of the
// row; `poison` is NaN if a class, the label too, is not finite.
template <class scalar_t>
MK_FN double scan_short_row(const scalar_t* z, int64_t classes, int64_t y, int64_t k,
                            Best<typename Lane<scalar_t>::acc>* best, typename Lane<scalar_t>::acc& poison) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const vector zero{}, one = zero + acc(1), v = load_part(z, classes, lowest);
  const vector others = replace_label<L>(v, 0, y, lowest);
  const uint32_t used = (1u << classes) - 1;
  if (lanes_above(v * acc(0) == zero ? zero : one, acc(0)) & used) poison = std::numeric_limits<acc>::quiet_NaN();
  vector left = others;
  for (int64_t j = 0; j < std::max<int64_t>(k, 1); ++j) {
    const acc max = largest_lane(left);
    const uint32_t where = lanes_above(left == zero + max ? one : zero, acc(0));
    if (!(max > lowest) || where == 0) break;  // only masked classes are left, or the row holds NaN
    best[j] = {max, __builtin_ctz(where)};
    if (j + 1 < k) left = replace_label<L>(left, 0, best[j].index, lowest);
  }
  return best[0].value > lowest ? sum(fold(exp_nonpositive(others - best[0].value))) : 0;
}

// S = sum over the competitors of exp(z_j - max): the vector that holds the label first, then the others in order.
template <class scalar_t>
MK_FN double sum_exp_of_others(const scalar_t* z, int64_t classes, int64_t y, typename Lane<scalar_t>::acc max) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const int64_t rest = classes / W * W, with_label = y / W * W;
  // Lanes are added in float64 after every block: 1000 additions in float32 would show in the seventh digit.
  constexpr int64_t block = 128 * W;
  int64_t room = block;
  f64x8 total{};
  vector a{}, b{};
  if (with_label < rest) {
    a += exp_nonpositive(replace_label<L>(load(z + with_label), with_label, y, lowest) - max);
  }
  for (int part = 0; part < 2; ++part) {
    int64_t i = part == 0 ? 0 : with_label + W;
    const int64_t end = part == 0 ? with_label : rest;
    while (i < end) {
      const int64_t begin = i, block_end = end - i < room ? end : i + room;
      for (; i + 2 * W <= block_end; i += 2 * W) {
        a += exp_nonpositive(load(z + i) - max);
        b += exp_nonpositive(load(z + i + W) - max);
      }
      if (i + W <= block_end) {
        a += exp_nonpositive(load(z + i) - max);
        i += W;
      }
      room -= i - begin;
      if (room == 0) {
        total += fold(a) + fold(b);
        a = b = vector{};
        room = block;
      }
    }
  }
  if (rest < classes) {
    const vector last = load_part(z + rest, classes - rest, lowest);
    b += exp_nonpositive(replace_label<L>(last, rest, y, lowest) - max);
  }
  return sum(total + (fold(a) + fold(b)));
}

template <class acc>
struct Spread {
  double deficit;  // sum over the finite competitors of max - z_j
  acc count;       // finite competitors
};

template <class scalar_t>
MK_FN Spread<typename Lane<scalar_t>::acc> spread_of_others(const scalar_t* z, int64_t classes, int64_t y,
                                                            typename Lane<scalar_t>::acc max) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  f64x8 deficit{}, count{};
  const auto add = [&](vector v) MK_TARGET {
    const auto finite = v > vector{} + lowest;
    deficit += fold(finite ? max - v : vector{});
    count += fold(finite ? vector{} + acc(1) : vector{});
  };
  int64_t i = 0;
  for (; i + W <= classes; i += W) add(load(z + i));
  if (i < classes) add(load_part(z + i, classes - i, lowest));
  const acc label = static_cast<acc>(z[y]);
  const bool finite = label > lowest;
  return {sum(deficit) - (finite ? double(max) - double(label) : 0), static_cast<acc>(sum(count) - (finite ? 1 : 0))};
}

// math::row_losses for several rows at once, which wait here until there are enough of them. They are computed in
// float64 whatever the others are, so a row's losses do not depend on the rows beside it.
template <class acc>
struct PendingLosses;

template <>
struct PendingLosses<double> {
  double *nll, *phi;
  MK_FN void add(int64_t n, double z_label, double max, double sum) {
    const math::RowLosses<double> losses = math::row_losses(z_label, max, sum);
    nll[n] = losses.nll;
    phi[n] = losses.phi;
  }
  MK_FN void finish() {}
};

template <>
struct PendingLosses<float> {
  float *nll, *phi;
  int64_t waiting = 0, rows[8];
  double leads[8] = {}, sums[8] = {1, 1, 1, 1, 1, 1, 1, 1};

  // sum = 0 (no competitor) and a masked label, whose lead is not finite, are the business of math::row_losses alone.
  MK_FN void add(int64_t n, float z_label, float max, float total) {
    if (total == 0 || math::is_masked(z_label)) {
      const math::RowLosses<float> losses = math::row_losses(z_label, max, total);
      nll[n] = losses.nll;
      phi[n] = losses.phi;
      return;
    }
    rows[waiting] = n;
    leads[waiting] = double(z_label) - double(max);
    sums[waiting] = total;
    if (++waiting == 8) finish();
  }
  // sum lies in [1, C], and so do the arguments of both logarithms but for 1.
  MK_FN void finish() {
    const f64x8 lead = load(leads), sum = load(sums), e = simd_exp2(abs(lead) * -1.44269504088896341);
    const auto ahead = lead >= 0.0;
    const f64x8 s = sum * e, log = simd_log(ahead ? s + 1.0 : sum + e);
    const f64x8 small = s * (1.0 - s * (0.5 - s * (1.0 / 3)));  // log1p(s); 1 + s has lost its digits
    const f64x8 from_phi = lead - simd_log(sum), from_nll = ahead ? (s < 1e-5 ? small : log) : log - lead;
    for (int64_t i = 0; i < waiting; ++i) {
      nll[rows[i]] = static_cast<float>(from_nll[i]);
      phi[rows[i]] = static_cast<float>(from_phi[i]);
    }
    waiting = 0;
  }
};

// Does the row hold NaN or +inf? (-inf is a masked class.)
template <class scalar_t>
MK_FN bool holds_nan_or_infinity(const scalar_t* z, int64_t classes) {
  using acc = typename Lane<scalar_t>::acc;
  bool found = false;
  for (int64_t i = 0; i < classes; ++i) found |= !(static_cast<acc>(z[i]) < std::numeric_limits<acc>::infinity());
  return found;
}

template <class scalar_t>
MK_TARGET void forward_rows(const CompetitorsForward<scalar_t>& at, int64_t begin, int64_t end,
                            std::atomic<int64_t>* bad) {
  using acc = typename Lane<scalar_t>::acc;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity(), nan = std::numeric_limits<acc>::quiet_NaN();
  const int64_t classes = at.classes, k = at.k;
  std::vector<Best<acc>> list(k > kListed ? 1 : std::max<int64_t>(k, 1));
  std::vector<int64_t> order(k > kListed ? classes : 0);
  PendingLosses<acc> losses{at.nll, at.phi};
  for (int64_t n = begin; n < end; ++n) {
    const scalar_t* z = at.logits + n * at.row_stride;
    const int64_t y = at.target[n * at.target_stride];
    int64_t* index = at.index + n * k;
    acc *gap = at.gap + n * k, *normalizer = at.normalizer + 3 * n, poison = 0;
    at.valid[n] = y != at.ignore_index;
    if (y == at.ignore_index) {
      std::iota(index, index + k, int64_t{0});
      std::fill_n(gap, k, acc(0));
      std::fill_n(normalizer, 3, acc(0));
      at.nll[n] = at.phi[n] = 0;
      if (at.uniform) at.uniform[n] = 0;
      continue;
    }
    if (y < 0 || y >= classes) {
      bad->store(n);
      return;
    }
    const acc z_label = static_cast<acc>(z[y]);
    poison += z_label * acc(0);
    std::fill(list.begin(), list.end(), Best<acc>{lowest, classes});
    double total = 0;
    const bool is_short = classes <= Lane<scalar_t>::width;
    if (is_short) {
      total = scan_short_row(z, classes, y, k, list.data(), poison);
    } else if (k <= 1 || k > kListed) {
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
    const acc max = list[0].value;
    // Some logit is not finite: is it only masked?
    if (!(poison == 0) && (holds_nan_or_infinity(z, classes) || (max == lowest && z_label == lowest))) {
      for (int64_t j = 0; j < k; ++j) {
        index[j] = j < y ? j : j + 1;
        gap[j] = nan;
      }
      std::fill_n(normalizer, 3, nan);
      at.nll[n] = at.phi[n] = nan;
      if (at.uniform) at.uniform[n] = nan;
      continue;
    }
    if (k > kListed) {
      std::iota(order.begin(), order.end(), int64_t{0});
      order.erase(order.begin() + y);
      std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t i, int64_t j) {
        return math::comes_before(static_cast<acc>(z[i]), i, static_cast<acc>(z[j]), j);
      });
      std::copy_n(order.begin(), k, index);
      order.resize(classes);
    } else {
      // Where the list is not full, masked classes follow, in their order.
      for (int64_t j = 0, masked = 0; j < k; ++j) {
        if (list[j].index == classes) {
          while (masked == y || static_cast<acc>(z[masked]) > lowest) ++masked;
          list[j].index = masked++;
        }
        index[j] = list[j].index;
      }
    }
    for (int64_t j = 0; j < k; ++j) gap[j] = math::gap(static_cast<acc>(z[index[j]]), z_label);
    if (!is_short && max > lowest) total = sum_exp_of_others(z, classes, y, max);
    const acc sum = static_cast<acc>(total);
    losses.add(n, z_label, max, sum);
    normalizer[0] = max;
    normalizer[1] = sum;
    normalizer[2] = 0;
    if (at.uniform) {
      const auto spread = max > lowest ? spread_of_others(z, classes, y, max) : Spread<acc>{0, 0};
      at.uniform[n] = math::uniform_loss(z_label, max, sum, static_cast<acc>(spread.deficit), spread.count);
      normalizer[2] = spread.count + (z_label > lowest ? acc(1) : acc(0));
    }
  }
  losses.finish();
}

// The competitors' entries of a whole row from one read; then those of label and competitors, again from float32 where
// dlogits are narrower.
template <class scalar_t>
MK_TARGET void backward_rows(const CompetitorsBackward<scalar_t>& at, int64_t begin, int64_t end) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const int64_t classes = at.classes, k = at.k;
  for (int64_t n = begin; n < end; ++n) {
    const scalar_t* z = at.logits + n * at.row_stride;
    scalar_t* dz = at.dlogits + n * classes;
    const int64_t y = at.target[n * at.target_stride];
    const int64_t* index = at.index + n * k;
    const acc max = at.normalizer[3 * n], sum = at.normalizer[3 * n + 1], count = at.normalizer[3 * n + 2];
    if (!(sum > 0)) {  // no competitor, or ignored: 0; or NaN
      std::fill_n(dz, classes, static_cast<scalar_t>(sum));
      continue;
    }
    // The next row's label lies anywhere in it, and its weights depend on it: a miss of the caches at every row.
    if (classes > 1024 && n + 1 < end) {
      const int64_t next = at.target[(n + 1) * at.target_stride];
      if (next >= 0 && next < classes) __builtin_prefetch(z + at.row_stride + next);
    }
    const acc z_label = static_cast<acc>(z[y]);
    const math::RowWeights<acc> row(at.grad_nll[n], at.grad_phi[n], at.grad_uniform[n], z_label, max, sum, count);
    const acc factor = row.of_others / sum;
    if (row.is_zero()) {
      std::memset(static_cast<void*>(dz), 0, classes * sizeof(scalar_t));
    } else if (row.share == 0) {
      int64_t i = 0;
      for (; i + W <= classes; i += W) store(dz + i, vector(exp_nonpositive(load(z + i) - max) * factor));
      if (i < classes) {
        store_part(dz + i, vector(exp_nonpositive(load_part(z + i, classes - i, max) - max) * factor), classes - i);
      }
    } else {
      const auto entries = [&](vector v) MK_TARGET {
        const vector share = v > vector{} + lowest ? vector{} + row.share : vector{};
        return vector(exp_nonpositive(v - max) * factor - share);
      };
      int64_t i = 0;
      for (; i + W <= classes; i += W) store(dz + i, entries(load(z + i)));
      if (i < classes) store_part(dz + i, entries(load_part(z + i, classes - i, max)), classes - i);
    }
    acc total = 0;
    const bool label_is_masked = math::is_masked(z_label);
    for (int64_t j = 0; j < k && at.grad_gap && !label_is_masked; ++j) {
      const acc z_other = static_cast<acc>(z[index[j]]);
      if (math::is_masked(z_other)) continue;
      const acc grad_gap = at.grad_gap[n * at.gap_strides[0] + j * at.gap_strides[1]];
      if (std::is_same_v<scalar_t, acc> && row.share == 0) {
        dz[index[j]] += static_cast<scalar_t>(grad_gap);
      } else {
        const acc q = row.of_others == 0 ? acc(0) : std::exp(z_other - max) / sum;
        dz[index[j]] = static_cast<scalar_t>(row.other(q, false) + grad_gap);
      }
      total += grad_gap;
    }
    dz[y] = static_cast<scalar_t>(row.label(label_is_masked) - total);
  }
}

}  // namespace margin_kernels::MK_ISA
