// The vector layer against scalar code: conversions for every 16-bit pattern, exponentials, powers, partial loads.
#include <bit>
#include <limits>
#include <random>
#include <vector>

#include "check.h"

// Kernel file of this test: what follows is compiled once per instruction set.
#define MK_KERNEL "../../tests/cpp/simd_kernel.h"
#include "cpu/foreach_isa.h"

namespace margin_kernels {
namespace {

template <class half>
void every_pattern_converts() {
  std::vector<half> in(65536);
  std::vector<float> wide(65536);
  std::vector<half> back(65536);
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    std::memcpy(static_cast<void*>(&in[i]), &bits, 2);
  }
  MK_DISPATCH(convert(in.data(), wide.data(), back.data(), 65536));
  for (int i = 0; i < 65536; ++i) {
    const float truth = static_cast<float>(in[i]);
    EXPECT(std::isnan(truth) ? std::isnan(wide[i])
                             : std::bit_cast<uint32_t>(wide[i]) == std::bit_cast<uint32_t>(truth));
    EXPECT(std::isnan(truth) ? std::isnan(static_cast<float>(back[i])) : std::memcmp(&back[i], &in[i], 2) == 0);
  }
}

template <class half>
void stores_round_to_nearest_even() {
  std::mt19937 random(1);
  std::vector<float> in(4096);
  std::vector<half> out(4096);
  for (auto& x : in) x = std::ldexp(std::uniform_real_distribution<float>(-2, 2)(random), int(random() % 30) - 20);
  in[0] = 1.0f + 0x1p-8f;  // halfway between two bfloat16
  in[1] = 1.0f + 0x3p-8f;
  in[2] = 1.0f + 0x1p-11f;  // halfway between two float16
  in[3] = std::numeric_limits<float>::infinity();
  MK_DISPATCH(narrow(in.data(), out.data(), 4096));
  for (int i = 0; i < 4096; ++i) EXPECT(static_cast<float>(out[i]) == static_cast<float>(half(in[i])));
}

void exponentials() {
  std::vector<float> in(4096), out(4096);
  for (int i = 0; i < 4096; ++i) in[i] = -87.2f * i / 4096;
  MK_DISPATCH(exponential(in.data(), out.data(), 4096));
  for (int i = 0; i < 4096; ++i) EXPECT_NEAR(out[i], std::exp(double(in[i])), 2.5e-7);
  std::fill(in.begin(), in.end(), -1e30f);
  MK_DISPATCH(exponential(in.data(), out.data(), 4096));
  for (float x : out) EXPECT(x == 0.0f);
}

// (x / reference)^q against long double, within what powers.h states.
void powers() {
  const bool tables = simd::instruction_set() == simd::InstructionSet::AVX512;
  constexpr int n = 4096;
  std::mt19937 random(2);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<float> in(n), out(2 * n);
  for (double reference : {1.0, 1.9e-3, 3e38, 2e-36, 3e-45}) {
    for (double q : {1.001, 7.0 / 6, 1.5, 2.5, 5.0, 20.0, 101.0, 512.0}) {
      for (auto& x : in) {
        x = static_cast<float>(reference * std::exp2(-(random() % 2 ? 90 / q : 1 / q) * uniform(random)));
      }
      MK_DISPATCH(power_of(in.data(), out.data(), n, q, reference, -3.0f));
      const double bound = (tables ? 1.3 + 0.1 * q : 1.7 + 0.5 * q) * 0x1p-24;
      for (int i = 0; i < n; ++i) {
        const auto truth = static_cast<double>(std::pow(static_cast<long double>(in[i]) / reference, q));
        if (in[i] == 0) continue;
        EXPECT_NEAR(out[i], truth, bound);
        EXPECT_NEAR(out[n + i], -3 * truth, bound + 0x1p-24);
      }
    }
  }
}

// What is no number, or too large, must show in a sum; what is too small must not count.
void powers_beyond_the_range() {
  constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> in(16), out(32);
  for (double q : {1.0, 1.25, 7.0, 512.0}) {
    const auto power = [&](float x, double reference, float factor) {
      in.assign(16, x);
      MK_DISPATCH(power_of(in.data(), out.data(), 16, q, reference, factor));
      return out[7];
    };
    EXPECT(!std::isfinite(power(infinity, 1, 1)) && !std::isfinite(power(infinity, 3e38, 1)));
    EXPECT(std::isnan(power(nan, 1, 1)) && std::isnan(power(nan, 3e38, 1)));
    EXPECT(power(3e38f, 1e-10, 1) >= 0x1p100f && power(3e38f, 3e-45, 1) >= 0x1p100f);
    EXPECT(power(0, 1, 1) <= 0x1p-100f && power(0, 3e-45, 1) <= 0x1p-100f && power(0, 3e38, 1) <= 0x1p-100f);
  }
  // A factor lifts what would be lost alone: 2^-130 * 2^100, and 2^-140 is subnormal.
  MK_DISPATCH(power_of(std::vector<float>(16, 0x1p-13f).data(), out.data(), 16, 10, 1, 0x1p100f));
  EXPECT_NEAR(out[16], 0x1p-30, 2e-7);
  MK_DISPATCH(power_of(std::vector<float>(16, 0x1p-14f).data(), out.data(), 16, 10, 1, 1.0f));
  EXPECT(out[16] == 0x1p-140f);
}

template <class scalar_t>
void partial_loads_and_stores_stay_inside() {
  for (int64_t n = 0; n < 16; ++n) {
    // Exactly n elements on the heap: AddressSanitizer sees a step beyond them.
    std::vector<scalar_t> in, out;
    for (int64_t i = 0; i < n; ++i) in.push_back(static_cast<scalar_t>(float(i + 1)));
    out.resize(n);
    in.shrink_to_fit();
    float lanes[16];
    MK_DISPATCH(part(in.data(), out.data(), n, lanes));
    for (int64_t i = 0; i < 16; ++i) EXPECT(lanes[i] == (i < n ? float(i + 1) : -7.0f));
    for (int64_t i = 0; i < n; ++i) EXPECT(static_cast<float>(out[i]) == float(i + 1));
  }
}

}  // namespace
}  // namespace margin_kernels

int main() {
  using namespace margin_kernels;
  every_pattern_converts<c10::BFloat16>();
  every_pattern_converts<c10::Half>();
  stores_round_to_nearest_even<c10::BFloat16>();
  stores_round_to_nearest_even<c10::Half>();
  exponentials();
  powers();
  powers_beyond_the_range();
  partial_loads_and_stores_stay_inside<float>();
  partial_loads_and_stores_stay_inside<c10::BFloat16>();
  partial_loads_and_stores_stay_inside<c10::Half>();
  return report("simd");
}
