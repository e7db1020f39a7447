// The softmax denominator of one row. Included by kernels, once per instruction set.

namespace margin_kernels::MK_ISA {

// sum_i exp(z_i - max)
template <class scalar_t>
MK_FN double sum_exp(const scalar_t* z, int64_t classes, typename Lane<scalar_t>::acc max) {
  using L = Lane<scalar_t>;
  using vector = typename L::vector;
  constexpr int64_t W = L::width;
  vector a{}, b{};
  int64_t i = 0;
  for (; i + 2 * W <= classes; i += 2 * W) {
    a += exp_nonpositive(load(z + i) - max);
    b += exp_nonpositive(load(z + i + W) - max);
  }
  for (; i + W <= classes; i += W) a += exp_nonpositive(load(z + i) - max);
  if (i < classes) {
    // Lanes behind the row hold max and add exp(0) each.
    b += exp_nonpositive(load_part(z + i, classes - i, max) - max);
    return sum(fold(a) + fold(b)) - static_cast<double>(W - (classes - i));
  }
  return sum(fold(a) + fold(b));
}

}  // namespace margin_kernels::MK_ISA
