// x -> (x / reference)^q for 16 magnitudes in float32 lanes. Included by kernels, once per instruction set.
//
// (x / reference)^q = 2^y with y = q (log2 x - log2 reference). log2 x = head + tail: heads have so few bits that the
// difference of two heads is exact, and so is what is left of q times it after the integer part of y is taken off.
// Only tails and the last product are rounded, so y is as good far from the reference as near it. A relative error e
// of the powers is an error e / q of the norm. The bounds are measured (tests/cpp/test_simd.cpp); u = 2^-24.
//
//   AVX-512   head: exponent, and log2 of one of 32 intervals of the mantissa; 2^y from one of 16 roots of two.
//             A power is off by 1.3 u + 0.1 q u at most.
//   others    head: exponent; 2^y by a polynomial on [-1/2, 1/2].
//             A power is off by 1.7 u + 0.5 q u at most.

namespace margin_kernels::MK_ISA {

// Beyond this q the integer part of y may leave the bits that hold it: the caller computes in float64.
constexpr double kLargestPower = 512;

#if MK_HAS_AVX512
// 2^(i/16 + kRootShift): with this shift all sixteen are within 0.26 u of their float32.
constexpr double kRootShift = 0x1.78755e79b4a1cp-5;
alignas(64) constexpr float kRoot[16] = {0x1.084922p+0f, 0x1.13fc92p+0f, 0x1.2034a0p+0f, 0x1.2cf72cp+0f,
                                         0x1.3a4a58p+0f, 0x1.48348ap+0f, 0x1.56bc72p+0f, 0x1.65e90cp+0f,
                                         0x1.75c1a2p+0f, 0x1.864dd2p+0f, 0x1.979590p+0f, 0x1.a9a128p+0f,
                                         0x1.bc7948p+0f, 0x1.d026fcp+0f, 0x1.e4b3bap+0f, 0x1.fa2962p+0f};

// r_i lies near the reciprocal of the middle of [1 + i/32, 1 + (i+1)/32), and -log2 r_i within 2^-29 of head_i 2^-16.
alignas(64) constexpr float kReciprocal[32] = {
    0x1.f81f5ep-1f, 0x1.e9234ap-1f, 0x1.dacf38p-1f, 0x1.cd9e30p-1f, 0x1.c0cea0p-1f, 0x1.b4dd4cp-1f, 0x1.a966c8p-1f,
    0x1.9eb558p-1f, 0x1.947e5ep-1f, 0x1.8ab28ap-1f, 0x1.818690p-1f, 0x1.789b58p-1f, 0x1.701fbcp-1f, 0x1.6801dep-1f,
    0x1.60445ap-1f, 0x1.58a282p-1f, 0x1.51cda6p-1f, 0x1.4afb30p-1f, 0x1.446c7ep-1f, 0x1.3eaee4p-1f, 0x1.3816b6p-1f,
    0x1.3266aap-1f, 0x1.2ca7a0p-1f, 0x1.2740e8p-1f, 0x1.21fbaap-1f, 0x1.1cf388p-1f, 0x1.181028p-1f, 0x1.13b69cp-1f,
    0x1.0ec932p-1f, 0x1.0a763ap-1f, 0x1.061eeep-1f, 0x1.01fec0p-1f};
alignas(64) constexpr float kHead[32] = {1466,  4319,  7130,  9794,  12455, 15005, 17519, 19926, 22284, 24602, 26825,
                                         29038, 31192, 33300, 35355, 37426, 39319, 41248, 43140, 44828, 46805, 48544,
                                         50334, 52048, 53751, 55406, 57042, 58522, 60227, 61749, 63302, 64802};
#endif

class Powers {
 public:
  MK_FN Powers(double q, double reference) {
    const double log2 = std::log2(reference);
    q_ = splat(static_cast<float>(q));
#if MK_HAS_AVX512
    const double head = std::nearbyint(log2 * 0x1p16) * 0x1p-16;
    tail_ = splat(static_cast<float>(-q * (log2 - head) - kRootShift));
    q_low_ = splat(static_cast<float>(q - static_cast<float>(q)));
    for (int j = 0; j < 2; ++j) {
      reciprocals_[j] = read<f32x16>(kReciprocal + 16 * j);
      heads_[j] = read<f32x16>(kHead + 16 * j) * 0x1p-16f - static_cast<float>(head);
    }
    roots_ = read<f32x16>(kRoot);
    for (int i = 0; i < 3; ++i) log2_[i] = splat(static_cast<float>(q * kLog2[i]));
#else
    const double head = std::nearbyint(log2 * 0x1p7) * 0x1p-7;
    head_ = splat(static_cast<float>(head));
    tail_ = splat(static_cast<float>(log2 - head));
    // Nine bits of q: the product with a head is exact.
    int exponent;
    const double mantissa = std::frexp(q, &exponent);
    const auto high = static_cast<float>(std::ldexp(std::nearbyint(mantissa * 0x1p9), exponent - 9));
    q_high_ = splat(high);
    q_low_ = splat(static_cast<float>(q - high));
#endif
  }

  // (x / reference)^q for x >= 0. Beyond the range it is 2^100 or more, below it 2^-125 or less. NaN gives NaN, and
  // infinity gives infinity or NaN.
  MK_FN f32x16 operator()(f32x16 x) const {
    f32x16 k;
    const f32x16 mantissa = split(x, k);
    return times_power_of_two(mantissa, k);
  }

  // factor (x / reference)^q for 0 < x <= reference (1 + u), with gradual underflow; q = 0 gives factor.
  MK_FN f32x16 times(f32x16 x, f32x16 factor) const {
    f32x16 k;
    const f32x16 mantissa = split(x, k);
    // The factor comes before the second half of the exponent: it may be what lifts the result into the range.
    const f32x16 half = clipped(k);
    return times_power_of_two(times_power_of_two(mantissa, half) * factor, k - half);
  }

 private:
#if MK_HAS_AVX512
  // log2(1 + z) = z (l0 + l1 z + l2 z^2) for |z| < 0.0155, to 2^-27.8
  static constexpr double kLog2[3] = {0x1.715476p+0, -0x1.715ebep-1, 0x1.ec8cb2p-2};

  // mantissa 2^floor(k) = (x / reference)^q, k in sixteenths
  MK_FN f32x16 split(f32x16 x, f32x16& k) const {
    // max returns its second argument where one is NaN; zero has the exponent -inf.
    const f32x16 exponent = (f32x16)_mm512_max_ps(_mm512_set1_ps(-300), _mm512_getexp_ps((__m512)x));
    const f32x16 m = (f32x16)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    const __m512i interval = (__m512i)(float_to_bits(m) >> 18);
    const __m512 r = _mm512_permutex2var_ps((__m512)reciprocals_[0], interval, (__m512)reciprocals_[1]);
    const __m512 h = _mm512_permutex2var_ps((__m512)heads_[0], interval, (__m512)heads_[1]);
    const f32x16 z = (f32x16)_mm512_fmsub_ps((__m512)m, r, _mm512_set1_ps(1));
    const f32x16 tail = z * (log2_[0] + z * (log2_[1] + z * log2_[2])) + tail_;
    const f32x16 head = exponent + (f32x16)h;
    const f32x16 t = (q_ * head + tail) + 786432.0f;  // 1.5 * 2^19: the sum is rounded to a sixteenth
    k = t - 786432.0f;
    const f32x16 f = (f32x16)_mm512_fmsub_ps((__m512)q_, (__m512)head, (__m512)k) + (q_low_ * head + tail);
    const f32x16 root = (f32x16)_mm512_permutexvar_ps((__m512i)t, (__m512)roots_);
    return root + root * f * (0x1.62e430p-1f + f * (0x1.ec000ap-3f + f * 0x1.c6ac56p-5f));  // 2^f to 2^-29
  }
  // The larger of k and -100
  MK_FN static f32x16 clipped(f32x16 k) { return (f32x16)_mm512_max_ps(_mm512_set1_ps(-100), (__m512)k); }
  MK_FN static f32x16 times_power_of_two(f32x16 x, f32x16 k) { return (f32x16)_mm512_scalef_ps((__m512)x, (__m512)k); }

  f32x16 q_, q_low_, tail_, reciprocals_[2], heads_[2], roots_, log2_[3];
#else
  // All ones where v < 0. GCC takes comparisons of wide vectors apart, lane by lane.
  MK_FN static u32x16 is_negative(u32x16 v) { return (u32x16)((i32x16)v >> 31); }
  MK_FN static f32x16 rounded(f32x16 x, float shift) { return (x + shift) - shift; }

  // mantissa 2^k = (x / reference)^q
  MK_FN f32x16 split(f32x16 x, f32x16& k) const {
    const u32x16 small = is_negative(float_to_bits(x) - 0x0d800000u);  // x < 2^-100
    const u32x16 normal = float_to_bits(x * 0x1p64f);
    const u32x16 bits = ((normal & small) | (float_to_bits(x) & ~small)) - 0x3f3504f3u;  // sqrt(1/2)
    const f32x16 z = bits_to_float((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    const u32x16 zero = is_negative(float_to_bits(x) - 1u);
    const u32x16 exponent = (u32x16)((i32x16)bits >> 23) - (small & 64u) - (zero & 200u);
    f32x16 series = splat(0x1.00d832p-3f);  // log2(1 + z) / z - 1, to 2^-27.2 in the logarithm
    series = series * z - 0x1.aeb380p-3f;
    series = series * z + 0x1.bd316ap-3f;
    series = series * z - 0x1.e87ce2p-3f;
    series = series * z + 0x1.268f78p-2f;
    series = series * z - 0x1.7160e6p-2f;
    series = series * z + 0x1.ec76f4p-2f;
    series = series * z - 0x1.71546ap-1f;
    series = series * z + 0x1.c551d0p-2f;
    const f32x16 curve = series * z, near = rounded(z + curve, 0x1.8p16f);  // a multiple of 2^-7
    // The integer in the low bits of 1.5 * 2^23
    const f32x16 head = ((bits_to_float(exponent + 0x4b400000u) - 0x1.8p23f) + near) - head_;
    const f32x16 rest = q_low_ * head + q_ * (((z - near) + curve) - tail_), exact = q_high_ * head;
    k = rounded(exact + rest, 0x1.8p23f);
    const f32x16 f = (exact - k) + rest;
    f32x16 e = splat(0x1.41f620p-13f);  // (2^f - 1) / f, to 2^-28.8
    e = e * f + 0x1.5f4706p-10f;
    e = e * f + 0x1.3b2d68p-7f;
    e = e * f + 0x1.c6aed8p-5f;
    e = e * f + 0x1.ebfbdcp-3f;
    e = e * f + 0x1.62e430p-1f;
    // Infinity and NaN have all bits of the exponent set.
    const u32x16 special = ~is_negative(float_to_bits(x) - 0x7f800000u) & 0x7fc00000u;
    return bits_to_float(float_to_bits(e * f + 1.0f) | special);
  }
  // The larger of k and -100
  MK_FN static f32x16 clipped(f32x16 k) {
    const f32x16 above = k + 100.0f;
    return bits_to_float(float_to_bits(above) & ~is_negative(float_to_bits(above))) - 100.0f;
  }
  MK_FN static f32x16 times_power_of_two(f32x16 x, f32x16 k) {
    u32x16 n = float_to_bits(k + 0x1.8p23f) - 0x4b400000u;
    n -= (n + 126u) & is_negative(n + 126u);
    n += (101u - n) & is_negative(101u - n);
    return x * bits_to_float((n + 127u) << 23);
  }

  f32x16 q_, q_high_, q_low_, head_, tail_;
#endif
};

}  // namespace margin_kernels::MK_ISA
