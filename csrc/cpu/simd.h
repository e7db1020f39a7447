// Loads, stores and elementary functions for one instruction set. Included by foreach_isa.h, once per set.
//
// Lane<scalar_t>::type is the vector in which scalar_t is computed: f64x8 for double, f32x16 for all others.

namespace margin_kernels::MK_ISA {

using namespace margin_kernels::simd;

#define MK_FN MK_TARGET __attribute__((always_inline)) inline

template <class scalar_t>
struct Lane {
  using vector = f32x16;
  using acc = float;
  using integers = i32x16;
  static constexpr int64_t width = 16;
};
template <>
struct Lane<double> {
  using vector = f64x8;
  using acc = double;
  using integers = i64x8;
  static constexpr int64_t width = 8;
};

template <class vector>
MK_FN vector read(const void* from) {
  vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

MK_FN f32x16 bits_to_float(u32x16 bits) { return (f32x16)bits; }
MK_FN u32x16 float_to_bits(f32x16 v) { return (u32x16)v; }

MK_FN f32x16 load(const float* from) { return read<f32x16>(from); }
MK_FN f64x8 load(const double* from) { return read<f64x8>(from); }

MK_FN f32x16 load(const c10::BFloat16* from) {
  return bits_to_float(__builtin_convertvector(read<u16x16>(from), u32x16) << 16);
}

#if MK_HAS_F16C
MK_FN f32x16 load(const c10::Half* from) {
#if MK_HAS_AVX512
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  const __m256 half[2] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + 1))};
  return read<f32x16>(half);
#endif
}
#else
// Shift the exponent and mantissa into place and rebias by a product with 2^112 (exact, subnormals too).
MK_FN f32x16 load(const c10::Half* from) {
  const u32x16 h = __builtin_convertvector(read<u16x16>(from), u32x16);
  const u32x16 magnitude = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
  const f32x16 finite = bits_to_float(magnitude) * 0x1p112f;
  const i32x16 is_special = (i32x16)((h & 0x7c00u) == 0x7c00u);
  return bits_to_float(sign | (is_special ? magnitude | 0x7f800000u : float_to_bits(finite)));
}
#endif

MK_FN void store(float* to, f32x16 v) { std::memcpy(to, &v, sizeof(v)); }
MK_FN void store(double* to, f64x8 v) { std::memcpy(to, &v, sizeof(v)); }

// Round to nearest even; NaN keeps its sign and becomes quiet.
MK_FN void store(c10::BFloat16* to, f32x16 v) {
  const u32x16 bits = float_to_bits(v);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const i32x16 is_nan = (i32x16)((bits & 0x7fffffffu) > 0x7f800000u);
  const u32x16 quiet = (bits >> 16) | 0x40u;
  const u16x16 half = __builtin_convertvector(is_nan ? quiet : rounded, u16x16);
  std::memcpy(to, &half, sizeof(half));
}

MK_FN void store(c10::Half* to, f32x16 v) {
#if MK_HAS_F16C
  __m256 half[2];
  std::memcpy(half, &v, sizeof(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + 1, _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; ++i) to[i] = c10::Half(v[i]);
#endif
}

// The first n < width elements; the others hold `fill`.
template <class scalar_t>
MK_FN typename Lane<scalar_t>::vector load_part(const scalar_t* from, int64_t n, typename Lane<scalar_t>::acc fill) {
  using L = Lane<scalar_t>;
#if MK_HAS_AVX512
  if constexpr (std::is_same_v<scalar_t, float>) {
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    return (f32x16)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, from);
  } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return (f32x16)_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
  }
#endif
  typename L::acc lanes[L::width];
  for (int64_t i = 0; i < L::width; ++i) lanes[i] = i < n ? static_cast<typename L::acc>(from[i]) : fill;
  return read<typename L::vector>(lanes);
}

template <class scalar_t>
MK_FN void store_part(scalar_t* to, typename Lane<scalar_t>::vector v, int64_t n) {
  using L = Lane<scalar_t>;
#if MK_HAS_AVX512
  if constexpr (std::is_same_v<scalar_t, float>) {
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  }
#endif
  typename L::acc lanes[L::width];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<scalar_t>(lanes[i]);
}

MK_FN f32x16 splat(float x) { return f32x16{} + x; }
MK_FN f64x8 splat(double x) { return f64x8{} + x; }
MK_FN f32x16 abs(f32x16 v) { return bits_to_float(float_to_bits(v) & 0x7fffffffu); }
MK_FN f64x8 abs(f64x8 v) { return (f64x8)((i64x8)v & 0x7fffffffffffffffll); }

// Larger of two, the second where the first is NaN: callers look for NaN elsewhere.
template <class vector>
MK_FN vector larger(vector a, vector b) {
  return a > b ? a : b;
}

// Bit i is set where lane i is larger than the threshold.
MK_FN uint32_t lanes_above(f32x16 v, float threshold) {
#if MK_HAS_AVX512
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(threshold), _CMP_GT_OQ);
#elif MK_HAS_F16C
  __m256 half[2];
  std::memcpy(half, &v, sizeof(v));
  const __m256 t = _mm256_set1_ps(threshold);
  const auto low = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(half[0], t, _CMP_GT_OQ)));
  return low | static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(half[1], t, _CMP_GT_OQ))) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(v[i] > threshold) << i;
  return bits;
#endif
}
MK_FN uint32_t lanes_above(f64x8 v, double threshold) {
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(v[i] > threshold) << i;
  return bits;
}

MK_FN float largest_lane(f32x16 v) {
#if MK_HAS_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < 16; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}
MK_FN double largest_lane(f64x8 v) {
  double best = v[0];
  for (int i = 1; i < 8; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// The lower and upper half of 16 floats in double precision; added, they are the first step of every sum over lanes.
MK_FN f64x8 widen_low(f32x16 v) {
#if MK_HAS_AVX512
  return (f64x8)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));  // GCC 12 makes seven instructions of the other
#else
  f32x8 half[2];
  std::memcpy(half, &v, sizeof(v));
  return __builtin_convertvector(half[0], f64x8);
#endif
}
MK_FN f64x8 widen_high(f32x16 v) {
#if MK_HAS_AVX512
  return (f64x8)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#else
  f32x8 half[2];
  std::memcpy(half, &v, sizeof(v));
  return __builtin_convertvector(half[1], f64x8);
#endif
}

MK_FN f64x8 fold(f32x16 v) { return widen_low(v) + widen_high(v); }
MK_FN f64x8 fold(f64x8 v) { return v; }

MK_FN double sum(f64x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
MK_FN double sum(f32x16 v) { return sum(fold(v)); }

MK_FN f32x16 simd_sqrt(f32x16 v) {
#if MK_HAS_AVX512
  return (f32x16)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < 16; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// exp(x) for finite x <= 0, relative error below 2 ulp; 0 below -87.3, where the true value leaves the normal range.
// x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by the polynomial of degree 6 with the smallest largest error (3e-9).
MK_FN f32x16 exp_nonpositive(f32x16 x) {
  const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 t = x * 1.44269504088896341f + shift;
  const f32x16 nf = t - shift;
  const f32x16 r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;
  f32x16 y = splat(0x1.6a23d0p-10f);
  y = y * r + 0x1.123a20p-7f;
  y = y * r + 0x1.5558f2p-5f;
  y = y * r + 0x1.555492p-3f;
  y = y * r + 0x1.fffffcp-2f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  // n lies in the low bits of t; those of the shift leave at the top. Far below the range it wraps, and 0 is returned.
  const f32x16 result = (f32x16)((u32x16)y + ((u32x16)t << 23));
  return x < -87.3f ? f32x16{} : result;
}
MK_FN f64x8 exp_nonpositive(f64x8 x) {
  for (int i = 0; i < 8; ++i) x[i] = std::exp(x[i]);
  return x;
}

// log2(x) for finite x > 0, not subnormal: the mantissa m in [sqrt(1/2), sqrt(2)) by the series of artanh((m-1)/(m+1)).
MK_FN f64x8 simd_log2(f64x8 x) {
  const i64x8 bits = (i64x8)x;
  i64x8 exponent = (bits - 0x3fe6a09e667f3bcdll) >> 52;
  const f64x8 m = (f64x8)((u64x8)bits - ((u64x8)exponent << 52));
  const f64x8 s = (m - 1.0) / (m + 1.0), s2 = s * s;
  f64x8 series = splat(1.0 / 19);
  for (int k = 17; k >= 1; k -= 2) series = series * s2 + 1.0 / k;
  return __builtin_convertvector(exponent, f64x8) + series * s * 2.88539008177792681;
}
MK_FN f64x8 simd_log(f64x8 x) { return simd_log2(x) * 0.693147180559945309; }

// 2^y for y < 1000; 0 where y <= -1000.
MK_FN f64x8 simd_exp2(f64x8 y) {
  const f64x8 shift = splat(6755399441055744.0);
  const f64x8 t = y + shift;
  const u64x8 n = (u64x8)t - (u64x8)shift;
  const f64x8 r = (y - (t - shift)) * 0.693147180559945309;
  f64x8 e = splat(1.0);
  for (int k = 12; k >= 1; --k) e = e * r * (1.0 / k) + 1.0;
  const f64x8 result = (f64x8)((u64x8)e + (n << 52));
  return y > -1000.0 ? result : f64x8{};
}

}  // namespace margin_kernels::MK_ISA
