// Every formula of csrc/math, called from a kernel: the headers are meant for the device too. Compiled, never run.
#include "math/competitors.h"
#include "math/dual_norm.h"
#include "math/margin_hinge.h"

using namespace margin_kernels::math;

template <class T>
__global__ void all_formulas(const T* in, T* out) {
  const T a = in[0], b = in[1], c = in[2];
  out[0] = comes_before(a, 0, b, 1) ? negative_log_likelihood(a, b, c) : softmax(a, b, c);
  out[1] = label_gradient(a, b, c) + competitor_gradient(a, b, c);
  out[2] =
      power<Norm::SUM>(a, b) + power<Norm::SQUARE>(a, b) + power<Norm::THREE_HALVES>(a, b) + power<Norm::GENERAL>(a, b);
  out[3] =
      root<Norm::MAX>(a, b) + root<Norm::SQUARE>(a, b) + root<Norm::THREE_HALVES>(a, b) + root<Norm::GENERAL>(a, b);
  out[4] = slope<Norm::SUM>(a, b, c) + slope<Norm::SQUARE>(a, b, c) + slope<Norm::THREE_HALVES>(a, b, c) +
           slope<Norm::GENERAL>(a, b, c);
  const T d = signed_distance(a, b, c);
  out[5] = active(d, b, c) ? term(d, b, c) : gap_slope(a, b, c) + norm_slope(a, b, c, d);
  out[6] = static_cast<T>(dual_exponent(static_cast<double>(a)));
}

template __global__ void all_formulas<float>(const float*, float*);
template __global__ void all_formulas<double>(const double*, double*);
