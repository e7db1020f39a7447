// Column sums of exponentials over tiles of rows, and the gradient of one row. Included once per instruction set.
//
// A tile is 16 rows by one vector of columns: it is read once, its largest entry per column moves the running maximum
// up, and the 16 exponentials are added in lanes before the running sum takes them in float64. The order of addition
// depends on the number of rows only.

#include "sum_exp.h"

namespace margin_kernels::MK_ISA {

constexpr int64_t kTileRows = 16;

MK_FN void scale_and_add(double* sum, f32x16 scale, f32x16 total) {
  store(sum, read<f64x8>(sum) * widen_low(scale) + widen_low(total));
  store(sum + 8, read<f64x8>(sum + 8) * widen_high(scale) + widen_high(total));
}
MK_FN void scale_and_add(double* sum, f64x8 scale, f64x8 total) { store(sum, read<f64x8>(sum) * scale + total); }

// max and sum of one vector of columns take in the tile z[0 .. rows) [width]. label[r]: the column of row r's own class
// in this vector, or a negative number; it is left out. `Whole`: 16 rows, a full vector, no own class among them.
template <bool Whole, class scalar_t>
MK_FN void add_tile(const scalar_t* const* z, int64_t column, int64_t rows, int64_t width, const int64_t* label,
                    typename Lane<scalar_t>::acc delta, typename Lane<scalar_t>::acc* max, double* sum) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using integers = typename L::integers;
  constexpr int64_t W = L::width;
  const vector floor = splat(-delta), before = load(max);
  integers lanes;
  for (int64_t i = 0; i < W; ++i) lanes[i] = i;
  const auto own = [&](int64_t r) MK_TARGET {
    const int64_t place = label[r] - column;
    return lanes == static_cast<decltype(lanes[0] + 0)>(place >= 0 && place < W ? place : -1);
  };
  vector v[kTileRows], top = before, poison{}, total[2] = {};
  for (int64_t r = 0; r < (Whole ? kTileRows : rows); ++r) {
    v[r] = Whole ? load(z[r] + column) : load_part(z[r] + column, width, -delta);
    if (!Whole) v[r] = own(r) ? floor : v[r];
    const vector bounded = v[r] < floor ? floor : v[r];
    poison += bounded - bounded;  // NaN if any is NaN or +inf
    top = larger(v[r], top);
  }
  for (int64_t r = 0; r < (Whole ? kTileRows : rows); ++r) {
    vector e = exp_nonpositive(larger(v[r], floor) - top);
    if (!Whole) e = own(r) ? vector{} : e;
    total[r % 2] += e;
  }
  store(max, top);
  scale_and_add(sum, exp_nonpositive(before - top), total[0] + total[1] + poison);
}

// max [end - begin] and sum over the rows [row_begin, row_end) of columns [begin, end). Both arrays are padded to whole
// vectors. max starts at -delta, which no bounded entry is below.
template <class scalar_t>
MK_TARGET void column_sums(const OneToNLogits<scalar_t>& at, int64_t row_begin, int64_t row_end, int64_t begin,
                           int64_t end, typename Lane<scalar_t>::acc* max, double* sum) {
  constexpr int64_t W = Lane<scalar_t>::width;
  std::vector<uint8_t> holds_label((end - begin + W - 1) / W);
  for (int64_t i = 0; i < static_cast<int64_t>(holds_label.size()) * W; ++i) {
    max[i] = -at.delta;
    sum[i] = 0;
  }
  for (int64_t tile = row_begin; tile < row_end; tile += kTileRows) {
    const int64_t rows = std::min(kTileRows, row_end - tile);
    const scalar_t* z[kTileRows];
    const int64_t* label = at.target + tile;
    const auto mark = [&](uint8_t value) {
      for (int64_t r = 0; r < rows; ++r) {
        if (label[r] >= begin && label[r] < end) holds_label[(label[r] - begin) / W] = value;
      }
    };
    for (int64_t r = 0; r < rows; ++r) z[r] = at.logits + (tile + r) * at.row_stride;
    mark(1);
    for (int64_t c = begin; c < end; c += W) {
      const int64_t width = std::min(W, end - c);
      if (rows == kTileRows && width == W && !holds_label[(c - begin) / W]) {
        add_tile<true>(z, c, rows, width, label, at.delta, max + (c - begin), sum + (c - begin));
      } else {
        add_tile<false>(z, c, rows, width, label, at.delta, max + (c - begin), sum + (c - begin));
      }
    }
    mark(0);
  }
}

// logsumexp of the rows [begin, end), NaN where a logit is NaN or +inf, -inf where all are -inf
template <class scalar_t>
MK_TARGET void row_logsumexp(const OneToNLogits<scalar_t>& at, int64_t begin, int64_t end,
                             typename Lane<scalar_t>::acc* out) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  for (int64_t n = begin; n < end; ++n) {
    const scalar_t* z = at.logits + n * at.row_stride;
    const vector low = splat(-std::numeric_limits<acc>::infinity());
    const vector lowest = splat(std::numeric_limits<acc>::lowest());
    vector top = low, poison{};
    int64_t i = 0;
    for (; i + W <= at.classes; i += W) {
      const vector v = load(z + i);
      top = larger(v, top);
      const vector bounded = v < lowest ? lowest : v;
      poison += bounded - bounded;
    }
    acc max = largest_lane(top), bad = 0;
    for (int64_t lane = 0; lane < W; ++lane) bad += poison[lane];
    for (; i < at.classes; ++i) {
      const acc v = static_cast<acc>(z[i]);
      max = v > max ? v : max;
      if (!math::is_masked_logit(v)) bad += v - v;
    }
    if (bad == 0 && math::is_masked_logit(max)) {
      out[n] = max;
    } else {
      out[n] = bad == 0 ? max + static_cast<acc>(std::log(sum_exp(z, at.classes, max))) : bad;
    }
  }
}

// dz[n, :] for n in [begin, end): every entry as a negative, then the label's again
template <class scalar_t>
MK_TARGET void gradient_rows(const OneToNBackward<scalar_t>& at, int64_t begin, int64_t end) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  using acc = typename L::acc;
  constexpr int64_t W = L::width;
  const int64_t classes = at.in.classes;
  const vector floor = splat(-at.in.delta);
  for (int64_t n = begin; n < end; ++n) {
    const scalar_t* z = at.in.logits + n * at.in.row_stride;
    scalar_t* dz = at.dlogits + n * classes;
    const int64_t y = at.in.target[n];
    const acc grad = at.grad[n], share = at.share[n];
    const auto negative = [&](vector v, int64_t i) MK_TARGET {
      const vector e = exp_nonpositive(v - load(at.shift + i)) * load(at.total + i);
      return v <= floor ? vector{} : e;
    };
    int64_t i = 0;
    if (at.normalizer == nullptr) {
      for (; i + W <= classes; i += W) store(dz + i, negative(load(z + i), i));
      if (i < classes) store_part(dz + i, negative(load_part(z + i, classes - i, 0), i), classes - i);
      dz[y] = static_cast<scalar_t>(math::label_part(static_cast<acc>(z[y]), at.in.delta, grad, share));
      continue;
    }
    // A row whose classes are all masked has no softmax: 0 in its place, as exp(-inf).
    const acc row = math::is_masked_logit(at.normalizer[n]) ? acc(0) : at.normalizer[n];
    // NaN by itself, not by way of the exponential of NaN.
    const acc weight = std::isnan(row) ? row : grad * (acc(1) - share);
    const auto both = [&](vector v, int64_t i) MK_TARGET { return negative(v, i) + exp_nonpositive(v - row) * weight; };
    for (; i + W <= classes; i += W) store(dz + i, both(load(z + i), i));
    if (i < classes) store_part(dz + i, both(load_part(z + i, classes - i, 0), i), classes - i);
    const acc own = static_cast<acc>(z[y]);
    dz[y] = static_cast<scalar_t>(math::label_part(own, at.in.delta, grad, acc(1)) +
                                  math::softmax_part(own, row, grad, share));
  }
}

}  // namespace margin_kernels::MK_ISA
