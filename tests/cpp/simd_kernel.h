// What test_simd.cpp runs for each instruction set.
#include "cpu/powers.h"

namespace margin_kernels::MK_ISA {

template <class half>
MK_TARGET void convert(const half* in, float* wide, half* back, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    store(wide + i, load(in + i));
    store(back + i, load(wide + i));
  }
}

template <class half>
MK_TARGET void narrow(const float* in, half* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(out + i, load(in + i));
}

MK_TARGET inline void exponential(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(out + i, exp_nonpositive(load(in + i)));
}

MK_TARGET inline void power_of(const float* in, float* out, int64_t n, double q, double reference, float factor) {
  const Powers powers(q, reference);
  for (int64_t i = 0; i < n; i += 16) {
    store(out + i, powers(load(in + i)));
    store(out + n + i, powers.times(load(in + i), splat(factor)));
  }
}

template <class scalar_t>
MK_TARGET void part(const scalar_t* in, scalar_t* out, int64_t n, float* lanes) {
  const f32x16 v = load_part(in, n, -7.0f);
  store(lanes, v);
  store_part(out, v, n);
}

}  // namespace margin_kernels::MK_ISA
