// sum of |g_i|^(4/3), the dual norm of p = 4, by tables. Included by kernels, once per instruction set; AVX-512 alone
// looks up 32 floats in one instruction, others take the general way (powers.h).
//
// Any c near the cube root of m, c = m^(1/3) (1 + e), gives with h = m - c^3
//   m^(4/3) = m c + c h / 3      relative error 2 e^2
// c: one line for each of 32 intervals of the mantissa times 2^(1/3) to the exponent; e < 3e-5, so 2 e^2 < 0.03 u with
// u = 2^-24. The second term is small, and the rounding of c^2 costs u / 3 in it.
//
// The exponents of a block of 4096 lie in the 32 below its largest; what lies lower counts as 2^-31 of the largest:
// 4096 * 2^(-31 * 4/3) = 2^-29 of the block's sum.
//
// bfloat16 has 128 mantissas, so that m^(4/3) = (1 + i / 128)^(4/3) 2^(4 e / 3) is two tables, both of floats in halves
// of 16 bits, which one instruction looks up for 32 entries. Each table is rounded once, 2^(1/3) and 2^(2/3) by a third
// of u.

#if MK_HAS_AVX512
namespace margin_kernels::MK_ISA {

struct CubeRootTables {
  alignas(64) float intercept[32], slope[32], exponents[64];  // 2^(k/3) for k = -31 .. 0, twice
  CubeRootTables() {
    for (int i = 0; i < 32; ++i) {
      // The chord between the ends of an interval, moved up by half of what it is too low in the middle
      const double from = 1 + i / 32.0, to = 1 + (i + 1) / 32.0, middle = std::cbrt((from + to) / 2);
      const double rise = (std::cbrt(to) - std::cbrt(from)) * 32;
      const double chord = (std::cbrt(from) + std::cbrt(to)) / 2;
      slope[i] = static_cast<float>(rise);
      intercept[i] = static_cast<float>((chord + middle) / 2 - rise * (from + to) / 2);
      exponents[i] = exponents[i + 32] = static_cast<float>(std::exp2((i - 31) / 3.0));
    }
  }
};

// About m^(1/3) for exponents in (top - 32, top], which are told apart by their last five bits.
class CubeRoots {
 public:
  MK_FN CubeRoots(const CubeRootTables& tables, int top) {
    const auto scale = static_cast<float>(std::exp2(top / 3.0));
    for (int j = 0; j < 2; ++j) {
      intercept_[j] = read<__m512>(tables.intercept + 16 * j);
      slope_[j] = read<__m512>(tables.slope + 16 * j);
      // The last bits of top + 127, as it stands in a float, find 2^(0/3).
      exponents_[j] = (__m512)(read<f32x16>(tables.exponents + ((31 - (top + 127)) & 31) + 16 * j) * scale);
    }
  }
  MK_FN f32x16 operator()(f32x16 m) const {
    const u32x16 bits = float_to_bits(m), interval = bits >> 18;
    const f32x16 mantissa = bits_to_float((bits & 0x7fffffu) | 0x3f800000u);
    return (at(intercept_, interval) + at(slope_, interval) * mantissa) * at(exponents_, bits >> 23);
  }

 private:
  MK_FN static f32x16 at(const __m512* table, u32x16 index) {
    return (f32x16)_mm512_permutex2var_ps(table[0], (__m512i)index, table[1]);
  }
  __m512 intercept_[2], slope_[2], exponents_[2];
};

// m^(4/3) = m c + small / 3
struct FourThirdsPower {
  f32x16 m, c, small;
};
MK_FN FourThirdsPower four_thirds_power(const CubeRoots& roots, f32x16 m, f32x16 least) {
  m = (f32x16)_mm512_max_ps((__m512)least, (__m512)m);
  const f32x16 c = roots(m);
  return {m, c, c * (f32x16)_mm512_fnmadd_ps((__m512)(c * c), (__m512)c, (__m512)m)};
}

struct Bfloat16Tables {
  alignas(64) uint16_t mantissas[2][128], exponents[2][64];  // the low and the high halves; exponents as above
  Bfloat16Tables() {
    const auto put = [](uint16_t (*halves)[128], int i, double value) {
      const float rounded = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &rounded, sizeof(bits));
      halves[0][i] = static_cast<uint16_t>(bits);
      halves[1][i] = static_cast<uint16_t>(bits >> 16);
    };
    for (int i = 0; i < 128; ++i) put(mantissas, i, std::cbrt(std::pow(1 + i / 128.0, 4)));
    uint16_t found[2][128];
    for (int i = 0; i < 32; ++i) put(found, i, std::exp2((i - 31) * (4 / 3.0)));
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 64; ++i) exponents[half][i] = found[half][i % 32];
    }
  }
};

// sum of m^(4/3) / 2^(4/3 top), of exponents that are at most `top`. Zeros, and what lies behind the end of a vector,
// count as the least there is, too.
MK_FN double four_thirds_total_of_bfloat16(const c10::BFloat16* g, int64_t n, int top) {
  static const Bfloat16Tables tables;
  __m512i mantissas[2][4], exponents[2];
  for (int half = 0; half < 2; ++half) {
    for (int j = 0; j < 4; ++j) mantissas[half][j] = read<__m512i>(tables.mantissas[half] + 32 * j);
    exponents[half] = read<__m512i>(tables.exponents[half] + ((31 - (top + 127)) & 31));
  }
  const __m512i magnitude = _mm512_set1_epi16(0x7fff), upper = _mm512_set1_epi16(0x40);
  const __m512i least = _mm512_set1_epi16(static_cast<int16_t>((top + 127 - 31) << 7));
  // The powers of 32 entries in two vectors, in an order of its own.
  const auto powers = [&](__m512i bits, f32x16& sum) MK_TARGET {
    const __m512i m = _mm512_max_epu16(_mm512_and_si512(bits, magnitude), least), e = _mm512_srli_epi16(m, 7);
    const __mmask32 is_upper = _mm512_test_epi16_mask(m, upper);
    __m512i factor[2], scale[2];
    for (int half = 0; half < 2; ++half) {
      const __m512i* table = mantissas[half];
      factor[half] = _mm512_mask_blend_epi16(is_upper, _mm512_permutex2var_epi16(table[0], m, table[1]),
                                             _mm512_permutex2var_epi16(table[2], m, table[3]));
      scale[half] = _mm512_permutexvar_epi16(e, exponents[half]);
    }
    const auto low = [](const __m512i* v) MK_TARGET { return (__m512)_mm512_unpacklo_epi16(v[0], v[1]); };
    const auto high = [](const __m512i* v) MK_TARGET { return (__m512)_mm512_unpackhi_epi16(v[0], v[1]); };
    sum = (f32x16)_mm512_fmadd_ps(low(factor), low(scale), (__m512)sum);
    sum = (f32x16)_mm512_fmadd_ps(high(factor), high(scale), (__m512)sum);
  };
  f64x8 sums{};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    // The next block, so that its largest entry need not wait for the memory
    for (int64_t j = 0; j < 64; j += 32) __builtin_prefetch(g + i + 4096 + j);
    f32x16 a{}, b{};
    powers(read<__m512i>(g + i), a);
    powers(read<__m512i>(g + i + 32), b);
    sums += fold(a + b);
  }
  for (; i < n; i += 32) {
    const __mmask32 inside = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
    f32x16 a{};
    powers(_mm512_maskz_loadu_epi16(inside, g + i), a);
    sums += fold(a);
  }
  return sum(sums);
}

// 0 where the largest entry of a block is so large or so small that powers might leave the range, or no number.
template <class scalar_t>
MK_FN double four_thirds_total(const scalar_t* g, int64_t n) {
  static const CubeRootTables tables;
  constexpr int64_t W = 16, block = 4096;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = n - begin < block ? n : begin + block;
    const double largest = row_max(g + begin, end - begin);
    if (largest == 0) continue;
    if (!(largest > 0x1p-60 && largest < 0x1p90)) return 0;
    const int exponent = std::ilogb(largest);
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      total += four_thirds_total_of_bfloat16(g + begin, end - begin, exponent) * std::exp2(exponent * (4 / 3.0));
      continue;
    }
    const CubeRoots roots(tables, exponent);
    const f32x16 least = splat(static_cast<float>(std::ldexp(1.0, exponent - 31)));
    const auto power = [&](f32x16 m) MK_TARGET { return four_thirds_power(roots, m, least); };
    f64x8 sums{};
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
      // The next block, so that its largest entry need not wait for the memory
      for (int64_t j = 0; j < 4 * W; j += 64 / sizeof(scalar_t)) __builtin_prefetch(g + i + block + j);
      f32x16 m[4];
      load_magnitudes(g + i, m[0], m[1]);
      load_magnitudes(g + i + 2 * W, m[2], m[3]);
      const FourThirdsPower a = power(m[0]), b = power(m[1]), c = power(m[2]), d = power(m[3]);
      const f32x16 ab = ((a.small + b.small) * (1.0f / 3) + a.m * a.c) + b.m * b.c;
      const f32x16 cd = ((c.small + d.small) * (1.0f / 3) + c.m * c.c) + d.m * d.c;
      sums += fold(ab) + fold(cd);
    }
    for (; i < end; i += W) {
      const FourThirdsPower a = power(abs(end - i < W ? load_part(g + i, end - i, 0.0f) : load(g + i)));
      sums += fold(a.small * (1.0f / 3) + a.m * a.c);
    }
    total += sum(sums);
  }
  return total;
}

}  // namespace margin_kernels::MK_ISA
#endif
