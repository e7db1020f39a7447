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

void powers() {
  std::vector<double> in(4096), out(4096);
  for (double q : {1.01, 7.0 / 6, 1.5, 5.0, 101.0}) {
    for (int i = 0; i < 4096; ++i) in[i] = std::ldexp((i + 1) / 4096.0, -(i % 9));
    MK_DISPATCH(power_of(in.data(), out.data(), 4096, q));
    for (int i = 0; i < 4096; ++i) {
      const double truth = std::pow(in[i], q);
      if (truth > 1e-290) EXPECT_NEAR(out[i], truth, 2e-11);
    }
  }
  in[0] = 0;
  MK_DISPATCH(power_of(in.data(), out.data(), 4096, 1.25));
  EXPECT(out[0] == 0);
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
  partial_loads_and_stores_stay_inside<float>();
  partial_loads_and_stores_stay_inside<c10::BFloat16>();
  partial_loads_and_stores_stay_inside<c10::Half>();
  return report("simd");
}
