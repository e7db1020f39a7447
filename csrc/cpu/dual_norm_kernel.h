// One row of the dual norm and of its derivative. g: [n] contiguous. Included once per instruction set.
//
// Order of summation: a few vectors are added in float32, as a tree, and the sums of trees in float64. It depends on n
// only. Where powers leave the range of float32 the total shows it, and the row is done again by `row_norm_powers`,
// which keeps them in the range.
//
// Error of the norms of float32 and smaller inputs before the last rounding, in u = 2^-24, half a unit of 1: the error
// of a power and that of the tree, over q. It is reached where all roundings go to the same side; they mostly cancel.
//   q       1    2      3/2    3      4      4/3                others
//   error   2    1.5    2.3    1.3    1.3    1.4 to 1.8         row_norm_powers

#include "powers.h"

namespace margin_kernels::MK_ISA {

using math::Norm;

// What is added up: |g|, |g|^2, |g|^(3/2), |g|^3, |g|^4.
enum class Term { SUM, SQUARE, THREE_HALVES, CUBE, FOURTH };

template <Term term>
MK_FN f32x16 power_lanes(f32x16 m) {
  if constexpr (term == Term::SUM) return m;
  if constexpr (term == Term::SQUARE) return m * m;
  if constexpr (term == Term::THREE_HALVES) return m * simd_sqrt(m);
  if constexpr (term == Term::CUBE) return m * m * m;
  return (m * m) * (m * m);
}

// |g_i| for 32 elements, in an order of its own: a sum sees no order.
template <class scalar_t>
MK_FN void load_magnitudes(const scalar_t* g, f32x16& a, f32x16& b) {
  a = abs(load(g));
  b = abs(load(g + 16));
}
MK_FN void load_magnitudes(const c10::BFloat16* g, f32x16& a, f32x16& b) {
  const u32x16 pairs = read<u32x16>(g);
  a = bits_to_float(pairs & 0x7fff0000u);
  b = bits_to_float((pairs << 16) & 0x7fff0000u);
}

// The sum of the powers of kTree vectors, as a tree
template <Term term>
constexpr int kTree = 4;

template <Term term>
MK_FN f32x16 sum_of_tree(const f32x16* m) {
  return (power_lanes<term>(m[0]) + power_lanes<term>(m[1])) + (power_lanes<term>(m[2]) + power_lanes<term>(m[3]));
}

#if MK_HAS_AVX512
// The unit for square roots takes one vector in nine cycles. From s = m rsqrt(m) instead, which is sqrt(m) (1 + 6e-5):
// m^(3/2) = m s + s (m - s^2) / 2, relative error 6e-9 before rounding. The second term is small, and added first.
template <>
constexpr int kTree<Term::THREE_HALVES> = 8;

template <>
MK_FN f32x16 sum_of_tree<Term::THREE_HALVES>(const f32x16* from) {
  f32x16 m[8], s[8], small[2] = {};
  for (int j = 0; j < 8; ++j) {
    // 1e-25 stands for all below it, 0 too: 3e-38 in a total that is trusted above 1e-20. NaN passes.
    m[j] = (f32x16)_mm512_max_ps(_mm512_set1_ps(1e-25f), (__m512)from[j]);
    s[j] = m[j] * (f32x16)_mm512_rsqrt14_ps((__m512)m[j]);
    small[j & 1] += s[j] * (f32x16)_mm512_fnmadd_ps((__m512)s[j], (__m512)s[j], (__m512)m[j]);
  }
  const f32x16 first = ((small[0] + small[1]) * 0.5f + m[0] * s[0]) + m[1] * s[1];
  return (first + (m[2] * s[2] + m[3] * s[3])) + ((m[4] * s[4] + m[5] * s[5]) + (m[6] * s[6] + m[7] * s[7]));
}
#endif

// sum of power(|g_i|)
template <Term term, class scalar_t>
MK_FN double row_total(const scalar_t* g, int64_t n) {
  constexpr int64_t W = 16;
  f64x8 total{};
  int64_t i = 0;
  constexpr int tree = kTree<term>;
  for (; i + tree * W <= n; i += tree * W) {
    f32x16 m[tree];
    for (int j = 0; j < tree; j += 2) load_magnitudes(g + i + j * W, m[j], m[j + 1]);
    total += fold(sum_of_tree<term>(m));
  }
  for (; i + W <= n; i += W) total += fold(power_lanes<term>(abs(load(g + i))));
  if (i < n) total += fold(power_lanes<term>(abs(load_part(g + i, n - i, 0.0f))));
  return sum(total);
}

template <Term term>
MK_FN double row_total(const double* g, int64_t n) {
  f64x8 a{}, b{};
  int64_t i = 0;
  const auto power = [](f64x8 m) MK_TARGET { return term == Term::SUM ? m : m * m; };
  for (; i + 16 <= n; i += 16) {
    a += power(abs(load(g + i)));
    b += power(abs(load(g + i + 8)));
  }
  for (; i + 8 <= n; i += 8) a += power(abs(load(g + i)));
  if (i < n) b += power(abs(load_part(g + i, n - i, 0.0)));
  return sum(a + b);
}

// max |g_i|, NaN if any is NaN. The bit patterns of magnitudes order like the magnitudes, NaN above infinity.
template <class scalar_t>
MK_FN double row_max_half(const scalar_t* g, int64_t n) {
  u16x32 a{}, b{};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const u16x32 x = read<u16x32>(g + i) & uint16_t(0x7fff), y = read<u16x32>(g + i + 32) & uint16_t(0x7fff);
    a = x > a ? x : a;
    b = y > b ? y : b;
  }
  a = a > b ? a : b;
  uint16_t lanes[32], best = 0;
  std::memcpy(lanes, &a, sizeof(a));
  for (int j = 0; j < 32; ++j) best = lanes[j] > best ? lanes[j] : best;
  for (; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, g + i, sizeof(bits));
    bits &= 0x7fff;
    best = bits > best ? bits : best;
  }
  scalar_t value;
  std::memcpy(static_cast<void*>(&value), &best, sizeof(best));
  return static_cast<float>(value);
}
MK_FN double row_max(const c10::BFloat16* g, int64_t n) { return row_max_half(g, n); }
MK_FN double row_max(const c10::Half* g, int64_t n) { return row_max_half(g, n); }

MK_FN double row_max(const float* g, int64_t n) {
  i32x16 a{}, b{}, c{}, d{};
  int64_t i = 0;
  const auto magnitude = [](const float* from) MK_TARGET { return read<i32x16>(from) & 0x7fffffff; };
  for (; i + 64 <= n; i += 64) {
    const i32x16 w = magnitude(g + i), x = magnitude(g + i + 16), y = magnitude(g + i + 32), z = magnitude(g + i + 48);
    a = w > a ? w : a;
    b = x > b ? x : b;
    c = y > c ? y : c;
    d = z > d ? z : d;
  }
  a = a > b ? a : b;
  c = c > d ? c : d;
  a = a > c ? a : c;
  int32_t best = 0;
  for (int j = 0; j < 16; ++j) best = a[j] > best ? a[j] : best;
  for (; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, g + i, sizeof(bits));
    bits &= 0x7fffffff;
    best = bits > best ? bits : best;
  }
  float value;
  std::memcpy(&value, &best, sizeof(best));
  return value;
}

MK_FN double row_max(const double* g, int64_t n) {
  double best = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double m = std::fabs(g[i]);
    best = m > best || std::isnan(m) ? m : best;
    if (std::isnan(best)) break;
  }
  return best;
}

}  // namespace margin_kernels::MK_ISA

#include "four_thirds.h"

namespace margin_kernels::MK_ISA {

// max * (sum of (|g_i| / max)^q)^(1/q) in float64: no entry leaves its range.
template <Norm norm, class scalar_t>
MK_FN double row_norm_scaled(const scalar_t* g, int64_t n, double q) {
  const double max = row_max(g, n);
  if (max == 0 || !std::isfinite(max)) return max;
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += math::power<norm>(std::fabs(static_cast<double>(g[i])) / max, q);
  return max * math::root<norm>(total, q);
}

// sum of powers(|g_i|), n <= kBlock. `group` vectors are added in float32, their sum in float64.
template <int group, class scalar_t>
MK_TARGET double block_total(const Powers& powers, const scalar_t* g, int64_t n) {
  constexpr int64_t W = 16;
  f64x8 total{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    f32x16 m[4];
    load_magnitudes(g + i, m[0], m[1]);
    load_magnitudes(g + i + 2 * W, m[2], m[3]);
    for (int j = 0; j < 4; ++j) m[j] = powers(m[j]);
    if constexpr (group == 4) total += fold((m[0] + m[1]) + (m[2] + m[3]));
    if constexpr (group == 2) total += fold(m[0] + m[1]) + fold(m[2] + m[3]);
    if constexpr (group == 1) total += (fold(m[0]) + fold(m[1])) + (fold(m[2]) + fold(m[3]));
  }
  for (; i + W <= n; i += W) total += fold(powers(abs(load(g + i))));
  if (i < n) total += fold(powers(abs(load_part(g + i, n - i, 0.0f))));
  return sum(total);
}

constexpr int64_t kBlock = 4096;

// reference * (sum of (|g_i| / reference)^q)^(1/q) for any entries and q. The reference is the largest of the first 64
// entries, so the sum is at least 1, and what is flushed to zero does not matter. A block with an entry so large that
// the sum reaches 2^90, which lies in the cache then, is done again with its largest entry as the reference.
//
// Error before the last rounding: (1.3 u + t) / q + 0.1 u with AVX-512, (1.7 u + t) / q + 0.5 u elsewhere; t = 0 for
// float32 and q < 1.6, 1 u for q < 2.3, else 2 u.
template <class scalar_t>
MK_FN double row_norm_powers(const scalar_t* g, int64_t n, double q) {
  if (q > kLargestPower) return row_norm_scaled<Norm::GENERAL>(g, n, q);
  const auto part_of = q > 2.3                                        ? block_total<4, scalar_t>
                       : sizeof(scalar_t) == sizeof(float) && q < 1.6 ? block_total<1, scalar_t>
                                                                      : block_total<2, scalar_t>;
  double reference = 0, total = 0;
  Powers powers(q, 1);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const scalar_t* block = g + begin;
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const auto refer_to = [&](double largest) MK_TARGET {
      total *= reference > 0 ? std::pow(reference / largest, q) : 0;
      reference = largest;
      powers = Powers(q, reference);
    };
    if (reference == 0) {
      double largest = row_max(block, size < 64 ? size : 64);
      if (largest == 0) largest = row_max(block, size);
      if (largest == 0) continue;
      if (!std::isfinite(largest)) return row_max(g, n);
      refer_to(largest);
    }
    double part = part_of(powers, block, size);
    if (!(part < 0x1p90)) {
      const double largest = row_max(block, size);
      if (!std::isfinite(largest)) return row_max(g, n);
      refer_to(largest);
      part = part_of(powers, block, size);
    }
    total += part;
  }
  return reference * math::root<Norm::GENERAL>(total, q);
}

// x^(2/3) for 1e-20 < x < 1e300, relative error below 1e-12: a guess from the exponent bits (5 %), then two Halley
// steps, each of which cubes the error. Eight at a time: one by one, the divisions take as long as a row of 200
// elements.
MK_FN f64x8 two_thirds_power(f64x8 x) {
  const i64x8 bits = __builtin_convertvector(__builtin_convertvector((i64x8)x, f64x8) * (1.0 / 3), i64x8);
  f64x8 t = (f64x8)(bits + 0x2a9f7893782da1ceLL);
  for (int i = 0; i < 2; ++i) {
    const f64x8 cube = t * t * t;
    t *= (cube + 2.0 * x) / (2.0 * cube + x);
  }
  return t * t;
}

// Does a total in float32 lanes (float64 for double) prove that no term overflowed and that what was flushed to zero,
// at most n * 1e-38 (n * 1e-308), does not matter?
template <class scalar_t>
MK_FN bool trustworthy(double total) {
  return std::is_same_v<scalar_t, double> ? total > 1e-280 && total < 1e300 : total > 1e-20 && total < 1e300;
}

// Is q what p / (p - 1) gives for a rounded p?
MK_FN bool is_near(double q, double value) { return std::fabs(q - value) < 1e-13; }

// For any entries
template <Norm norm, class scalar_t>
MK_FN double row_norm_careful(const scalar_t* g, int64_t n, double q) {
  if constexpr (std::is_same_v<scalar_t, double>)
    return row_norm_scaled<norm>(g, n, q);
  else
    return row_norm_powers(g, n, q);
}

template <Norm norm, class scalar_t>
MK_FN double row_norm(const scalar_t* g, int64_t n, double q) {
  if constexpr (norm == Norm::MAX) return row_max(g, n);
  if constexpr (norm == Norm::SUM) return row_total<Term::SUM>(g, n);
  if constexpr (norm == Norm::SQUARE) {
    const double total = row_total<Term::SQUARE>(g, n);
    if (trustworthy<scalar_t>(total)) return math::root<norm>(total, q);
  }
  if constexpr (norm == Norm::GENERAL && !std::is_same_v<scalar_t, double>) {
    if (is_near(q, 3)) {
      const double total = row_total<Term::CUBE>(g, n);
      if (trustworthy<scalar_t>(total)) return std::cbrt(total);
    } else if (is_near(q, 4)) {
      const double total = row_total<Term::FOURTH>(g, n);
      if (trustworthy<scalar_t>(total)) return std::sqrt(std::sqrt(total));
    }
#if MK_HAS_AVX512
    if (is_near(q, 4.0 / 3)) {
      const double total = four_thirds_total(g, n);
      if (total > 0) return std::sqrt(total) * std::sqrt(std::sqrt(total));
    }
#endif
  }
  return row_norm_careful<norm>(g, n, q);
}

// put(j, norm of the row at row(j)) for j in [0, count). row(j) may be asked for twice.
template <Norm norm, class scalar_t, class Row, class Put>
MK_FN void norms_of(int64_t count, int64_t length, double q, const Row& row, const Put& put) {
  if constexpr (norm == Norm::THREE_HALVES && !std::is_same_v<scalar_t, double>) {
    for (int64_t begin = 0; begin < count; begin += 8) {
      const int64_t eight = count - begin < 8 ? count - begin : 8;
      f64x8 totals = splat(1.0);
      for (int64_t j = 0; j < eight; ++j) totals[j] = row_total<Term::THREE_HALVES>(row(begin + j), length);
      const f64x8 values = two_thirds_power(totals);
      for (int64_t j = 0; j < eight; ++j) {
        const bool direct = trustworthy<scalar_t>(totals[j]);
        put(begin + j, direct ? values[j] : row_norm_powers(row(begin + j), length, q));
      }
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) put(j, row_norm<norm>(row(j), length, q));
}

// norms[r * norm_stride] for rows r in [begin, end) of one layer
template <Norm norm, class scalar_t>
MK_TARGET void norm_rows(const Rows<const scalar_t>& rows, int64_t begin, int64_t end, double q,
                         typename Lane<scalar_t>::acc* norms, int64_t norm_stride) {
  norms_of<norm, scalar_t>(
      end - begin, rows.length, q, [&](int64_t j) MK_TARGET { return rows.at(begin + j); },
      [&](int64_t j, double value)
          MK_TARGET { norms[(begin + j) * norm_stride] = static_cast<typename Lane<scalar_t>::acc>(value); });
}

// out_i = grad * d norm / d g_i
template <Norm norm, class scalar_t>
MK_FN void row_slope(const scalar_t* g, int64_t n, double q, double value, double grad, scalar_t* out) {
  using L = Lane<scalar_t>;
  using acc = typename L::acc;
  if (value == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<scalar_t>(acc(0));
    return;
  }
  if constexpr (norm == Norm::MAX) {
    int64_t ties = 0;
    for (int64_t i = 0; i < n; ++i) ties += std::fabs(static_cast<acc>(g[i])) == static_cast<acc>(value);
    const acc share = std::isnan(value) ? static_cast<acc>(value) : static_cast<acc>(grad / ties);
    for (int64_t i = 0; i < n; ++i) {
      const acc x = static_cast<acc>(g[i]);
      const bool tie = std::fabs(x) == static_cast<acc>(value) || std::isnan(value);
      out[i] = static_cast<scalar_t>(tie ? (x < 0 ? -share : share) : acc(0));
    }
    return;
  }
  // |g| <= norm, so the ratio stays in [0, 1] whatever the scale; its reciprocal is exact enough only in double.
  const double inverse = 1 / value;
  int64_t i = 0;
  if constexpr (!std::is_same_v<scalar_t, double> && norm != Norm::GENERAL) {
    const float up = value < 1e-20 ? 0x1p64f : (value > 1e20 ? 0x1p-64f : 1.0f);
    const f32x16 reciprocal = splat(static_cast<float>(inverse / up)), scale = splat(up);
    const f32x16 c = splat(static_cast<float>(grad));
    const auto slope = [&](f32x16 x) MK_TARGET {
      const u32x16 sign = float_to_bits(x) & 0x80000000u;
      f32x16 m;
      if constexpr (norm == Norm::SUM) {
        m = x != x ? x : (x == 0.0f ? f32x16{} : splat(1.0f));
      } else {
        m = abs(x) * scale * reciprocal;
        if constexpr (norm == Norm::THREE_HALVES) m = simd_sqrt(m);
      }
      return bits_to_float(float_to_bits(m) | sign) * c;
    };
    for (; i + 16 <= n; i += 16) store(out + i, slope(load(g + i)));
    if (i < n) store_part(out + i, slope(load_part(g + i, n - i, 0.0f)), n - i);
    return;
  }
  if constexpr (!std::is_same_v<scalar_t, double> && norm == Norm::GENERAL) {
    // Where q is large, or the norm infinite, entry by entry in float64.
    if (q <= 16 && std::isfinite(value)) {
      const Powers powers(q - 1, value);
      const f32x16 c = splat(static_cast<float>(grad));
      const auto slope = [&](f32x16 x) MK_TARGET {
        const f32x16 m = abs(x);
        const u32x16 sign = float_to_bits(x) & 0x80000000u, is_zero = (u32x16)(m == 0.0f);
        const u32x16 bits = float_to_bits(powers.times(m, c));
        return bits_to_float(((bits & ~is_zero) | (float_to_bits(m * c) & is_zero)) ^ sign);
      };
      for (; i + 16 <= n; i += 16) store(out + i, slope(load(g + i)));
      if (i < n) store_part(out + i, slope(load_part(g + i, n - i, 0.0f)), n - i);
      return;
    }
  }
  for (; i < n; ++i) {
    out[i] = static_cast<scalar_t>(static_cast<acc>(math::slope<norm>(static_cast<double>(g[i]), value, q) * grad));
  }
}

template <Norm norm, class scalar_t>
MK_TARGET void slope_rows(const Rows<const scalar_t>& rows, const Rows<scalar_t>& out, int64_t begin, int64_t end,
                          double q, const typename Lane<scalar_t>::acc* norms,
                          const typename Lane<scalar_t>::acc* grads, int64_t norm_stride) {
  for (int64_t r = begin; r < end; ++r) {
    row_slope<norm>(rows.at(r), rows.length, q, norms[r * norm_stride], grads[r * norm_stride], out.at(r));
  }
}

}  // namespace margin_kernels::MK_ISA
