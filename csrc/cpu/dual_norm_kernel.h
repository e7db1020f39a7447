// One row of the dual norm and of its derivative. g: [n] contiguous. Included once per instruction set.
//
// Order of summation: blocks of 4096 elements; in a block four vectors of lanes in float32; block lanes are added in
// float64. It depends on n only. Squares and 3/2 powers that leave the range of float32 show in the total, and the row
// is then done again in float64 after division by its largest entry.

namespace margin_kernels::MK_ISA {

using math::Norm;

constexpr int64_t kBlock = 4096;

template <Norm norm>
MK_FN f32x16 power_lanes(f32x16 m) {
  if constexpr (norm == Norm::SUM) return m;
  if constexpr (norm == Norm::SQUARE) return m * m;
  return m * simd_sqrt(m);
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

// Four sums of lanes, so that the additions of neighbouring vectors do not wait for each other.
template <Norm norm>
struct Sums {
  f32x16 lanes[4] = {};
  MK_FN void add(int which, f32x16 m) { lanes[which] += power_lanes<norm>(m); }
  MK_FN f64x8 folded() const { return fold((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])); }
};

#if MK_HAS_AVX512
// m^(3/2) = m y with y = sqrt(m). The unit for square roots takes one vector in nine cycles, so three of four vectors
// start from r = 1/sqrt(m) (1 + 6e-5) and one Newton step: with u = m r, m^(3/2) = 3/2 m u - 1/2 u^3, relative error
// 6e-9 before rounding. The two sums are kept apart: two products and two FMAs per vector.
template <>
struct Sums<Norm::THREE_HALVES> {
  f32x16 exact{}, mu[3] = {}, cubes[3] = {};
  MK_FN void add(int which, f32x16 m) {
    if (which == 3) {
      exact += m * simd_sqrt(m);
      return;
    }
    // 1e-25 stands for all below it, 0 too: 3e-38 in a total that is trusted above 1e-20. NaN passes.
    m = (f32x16)_mm512_max_ps(_mm512_set1_ps(1e-25f), (__m512)m);
    const f32x16 u = m * (f32x16)_mm512_rsqrt14_ps((__m512)m);
    mu[which] += m * u;
    cubes[which] += u * u * u;
  }
  MK_FN f64x8 folded() const {
    return fold(exact + ((mu[0] + mu[1] + mu[2]) * 1.5f - (cubes[0] + cubes[1] + cubes[2]) * 0.5f));
  }
};
#endif

// sum of power(|g_i|) for SUM, SQUARE, THREE_HALVES
template <Norm norm, class scalar_t>
MK_FN double row_total(const scalar_t* g, int64_t n) {
  constexpr int64_t W = 16;
  f64x8 total{};
  int64_t i = 0;
  while (n - i >= W) {
    const int64_t block_end = i + (n - i < kBlock ? (n - i) / W * W : kBlock);
    Sums<norm> sums;
    for (; i + 4 * W <= block_end; i += 4 * W) {
      f32x16 m[4];
      load_magnitudes(g + i, m[0], m[1]);
      load_magnitudes(g + i + 2 * W, m[2], m[3]);
      for (int j = 0; j < 4; ++j) sums.add(j, m[j]);
    }
    for (; i < block_end; i += W) sums.add(0, abs(load(g + i)));
    if (i < n && n - i < W) {
      sums.add(1, abs(load_part(g + i, n - i, 0.0f)));
      i = n;
    }
    total += sums.folded();
  }
  if (i < n) total += fold(power_lanes<norm>(abs(load_part(g + i, n - i, 0.0f))));
  return sum(total);
}

template <Norm norm>
MK_FN double row_total(const double* g, int64_t n) {
  f64x8 a{}, b{};
  int64_t i = 0;
  const auto term = [](f64x8 m) MK_TARGET { return norm == Norm::SUM ? m : m * m; };
  for (; i + 16 <= n; i += 16) {
    a += term(abs(load(g + i)));
    b += term(abs(load(g + i + 8)));
  }
  for (; i + 8 <= n; i += 8) a += term(abs(load(g + i)));
  if (i < n) b += term(abs(load_part(g + i, n - i, 0.0)));
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

// max * (sum of (|g_i| / max)^q)^(1/q) in float64: no entry leaves its range.
template <Norm norm, class scalar_t>
MK_FN double row_norm_scaled(const scalar_t* g, int64_t n, double q) {
  const double max = row_max(g, n);
  if (max == 0 || !std::isfinite(max)) return max;
  double total = 0;
  if constexpr (norm == Norm::GENERAL && !std::is_same_v<scalar_t, double>) {
    f64x8 lanes{};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const f32x16 m = abs(load(g + i));
      lanes += simd_power(widen_low(m) / max, q) + simd_power(widen_high(m) / max, q);
    }
    if (i < n) {
      const f32x16 m = abs(load_part(g + i, n - i, 0.0f));
      lanes += simd_power(widen_low(m) / max, q) + simd_power(widen_high(m) / max, q);
    }
    total = sum(lanes);
  } else {
    for (int64_t i = 0; i < n; ++i) total += math::power<norm>(std::fabs(static_cast<double>(g[i])) / max, q);
  }
  return max * math::root<norm>(total, q);
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

template <Norm norm, class scalar_t>
MK_FN double row_norm(const scalar_t* g, int64_t n, double q) {
  if constexpr (norm == Norm::MAX) return row_max(g, n);
  if constexpr (norm == Norm::SUM) return row_total<norm>(g, n);
  if constexpr (norm == Norm::SQUARE) {
    const double total = row_total<norm>(g, n);
    if (trustworthy<scalar_t>(total)) return math::root<norm>(total, q);
  }
  return row_norm_scaled<norm>(g, n, q);
}

// put(j, norm of the row at row(j)) for j in [0, count). row(j) may be asked for twice.
template <Norm norm, class scalar_t, class Row, class Put>
MK_FN void norms_of(int64_t count, int64_t length, double q, const Row& row, const Put& put) {
  if constexpr (norm == Norm::THREE_HALVES && !std::is_same_v<scalar_t, double>) {
    for (int64_t begin = 0; begin < count; begin += 8) {
      const int64_t eight = count - begin < 8 ? count - begin : 8;
      f64x8 totals = splat(1.0);
      for (int64_t j = 0; j < eight; ++j) totals[j] = row_total<norm>(row(begin + j), length);
      const f64x8 values = two_thirds_power(totals);
      for (int64_t j = 0; j < eight; ++j) {
        const bool direct = trustworthy<scalar_t>(totals[j]);
        put(begin + j, direct ? values[j] : row_norm_scaled<norm>(row(begin + j), length, q));
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
