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
template <class scalar_t>
MK_FN FourThirdsPower four_thirds_power(const CubeRoots& roots, f32x16 m, f32x16 least) {
  m = (f32x16)_mm512_max_ps((__m512)least, (__m512)m);
  f32x16 c = roots(m);
  // 16 bits of c times the 8 of a bfloat16: m c is exact.
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) c = bits_to_float(float_to_bits(c) & 0xffffff00u);
  return {m, c, c * (f32x16)_mm512_fnmadd_ps((__m512)(c * c), (__m512)c, (__m512)m)};
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
    const CubeRoots roots(tables, exponent);
    const f32x16 least = splat(static_cast<float>(std::ldexp(1.0, exponent - 31)));
    const auto power = [&](f32x16 m) MK_TARGET { return four_thirds_power<scalar_t>(roots, m, least); };
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
      sums += std::is_same_v<scalar_t, c10::BFloat16> ? fold(ab + cd) : fold(ab) + fold(cd);
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
