// Every formula of csrc/math, called from a kernel: the headers are meant for the device too. Compiled, never run.
#include "math/competitors.h"
#include "math/deepfool_step.h"
#include "math/dual_norm.h"
#include "math/margin_hinge.h"
#include "math/one_to_n.h"
#include "math/row_distance.h"

using namespace margin_kernels::math;

template <class T>
__global__ void all_formulas(const T* in, T* out) {
  const T a = in[0], b = in[1], c = in[2];
  const RowLosses<T> losses = row_losses(a, b, c);
  const RowWeights<T> weights(a, b, c, a, b, c, a);
  out[0] = comes_before(a, 0, b, 1) ? losses.nll + losses.phi : uniform_loss(a, b, c, a, b);
  out[1] = weights.is_zero() ? gap(a, b) : weights.other(a, is_masked(b)) + weights.label(is_masked(c));
  out[2] =
      power<Norm::SUM>(a, b) + power<Norm::SQUARE>(a, b) + power<Norm::THREE_HALVES>(a, b) + power<Norm::GENERAL>(a, b);
  out[3] =
      root<Norm::MAX>(a, b) + root<Norm::SQUARE>(a, b) + root<Norm::THREE_HALVES>(a, b) + root<Norm::GENERAL>(a, b);
  out[4] = slope<Norm::SUM>(a, b, c) + slope<Norm::SQUARE>(a, b, c) + slope<Norm::THREE_HALVES>(a, b, c) +
           slope<Norm::GENERAL>(a, b, c);
  const T d = signed_distance(a, b, c);
  out[5] = active(d, b, c) ? term(d, b, c) : gap_slope(a, b, c) + norm_slope(a, b, c, d);
  out[6] = static_cast<T>(dual_exponent(static_cast<double>(a)));
  out[7] = is_class(static_cast<int64_t>(a), 3)
               ? pair_slope<Norm::SUM>(a, b, c, d) + pair_slope<Norm::SQUARE>(a, b, c, d)
               : pair_slope<Norm::GENERAL>(a, b, c, d);
  out[8] = bounded_label(a, b) + bounded_negative(a, b) + softplus(a) + negative_share(a, b);
  out[9] = one_to_n_loss(a, b) + one_to_n_cross_entropy_loss(a, b, c) + negative_gradient(a, b, c, d) +
           label_part(a, b, c, d) + softmax_part(a, b, c, d);
  out[10] = boundary_distance(a, b) + gap_gradient(a, b, c) + row_gradient<Norm::MAX>(a, b, c, d, a, b, c, d) +
            row_gradient<Norm::SQUARE>(a, b, c, d, a, b, c, d) +
            row_gradient<Norm::THREE_HALVES>(a, b, c, d, a, b, c, d) +
            row_gradient<Norm::GENERAL>(a, b, c, d, a, b, c, d);
}

template __global__ void all_formulas<float>(const float*, float*);
template __global__ void all_formulas<double>(const double*, double*);
