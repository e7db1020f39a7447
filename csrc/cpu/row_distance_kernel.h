// Norms of row differences. The difference of a pair lies in a buffer of one row, which stays in the first-level cache;
// what costs is the gather of the rows from memory, so the next pair's rows are asked for while this pair is computed.
// Included once per instruction set.

#include "dual_norm_kernel.h"

namespace margin_kernels::MK_ISA {

// to = a - b [n], in float32 (float64 for double); asks for the rows `next` on the way
template <class scalar_t>
MK_FN void difference(const scalar_t* a, const scalar_t* b, int64_t n, typename Lane<scalar_t>::acc* to,
                      const scalar_t* next_a, const scalar_t* next_b) {
  constexpr int64_t W = Lane<scalar_t>::width;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    __builtin_prefetch(next_a + i);
    __builtin_prefetch(next_b + i);
    store(to + i, load(a + i) - load(b + i));
  }
  if (i < n) store_part(to + i, load_part(a + i, n - i, 0) - load_part(b + i, n - i, 0), n - i);
}

// norm[n, :] for n in [begin, end)
template <Norm norm, class scalar_t>
MK_TARGET void distance_rows(const RowPairs<scalar_t>& at, int64_t begin, int64_t end, double q,
                             typename Lane<scalar_t>::acc* norms) {
  using acc = typename Lane<scalar_t>::acc;
  std::vector<acc> buffer(at.length);
  const int64_t first = begin * at.k, last = end * at.k - 1;
  const auto row = [&](int64_t j) MK_TARGET {
    const int64_t pair = first + j, next = std::min(pair + 1, last);
    difference(at.row(at.index[pair]), at.row(at.target[pair / at.k]), at.length, buffer.data(), at.row(at.index[next]),
               at.row(at.target[next / at.k]));
    return static_cast<const acc*>(buffer.data());
  };
  norms_of<norm, acc>(last + 1 - first, at.length, q, row,
                      [&](int64_t j, double value) MK_TARGET { norms[first + j] = static_cast<acc>(value); });
}

// drows[c] for c in [begin, end): the slopes of the pairs that c takes part in, in their order, rounded once
template <Norm norm, class scalar_t>
MK_TARGET void gradient_rows(const RowPairs<scalar_t>& at, const RowUses& uses, int64_t begin, int64_t end, double q,
                             const typename Lane<scalar_t>::acc* norms, const typename Lane<scalar_t>::acc* grads,
                             scalar_t* drows) {
  using acc = typename Lane<scalar_t>::acc;
  constexpr int64_t W = Lane<scalar_t>::width;
  const int64_t length = at.length, k = at.k;
  std::vector<acc> buffer(length), slopes(length), total(length);
  for (int64_t c = begin; c < end; ++c) {
    scalar_t* to = drows + c * length;
    if (uses.first[c] == uses.first[c + 1]) {
      std::memset(static_cast<void*>(to), 0, length * sizeof(scalar_t));
      continue;
    }
    std::fill(total.begin(), total.end(), acc(0));
    const auto add_pair = [&](int64_t pair, acc sign) MK_TARGET {
      if (norms[pair] == 0) return;
      const scalar_t *a = at.row(at.index[pair]), *b = at.row(at.target[pair / k]);
      difference(a, b, length, buffer.data(), a, b);
      row_slope<norm>(buffer.data(), length, q, norms[pair], sign * grads[pair], slopes.data());
      for (int64_t i = 0; i < length; ++i) total[i] += slopes[i];
    };
    for (int64_t u = uses.first[c]; u < uses.first[c + 1]; ++u) {
      const int64_t n = uses.place[u] / (k + 1), j = uses.place[u] % (k + 1);
      if (j < k) {
        add_pair(n * k + j, acc(1));
      } else {
        for (int64_t i = 0; i < k; ++i) add_pair(n * k + i, acc(-1));
      }
    }
    int64_t i = 0;
    for (; i + W <= length; i += W) store(to + i, load(total.data() + i));
    if (i < length) store_part(to + i, load_part(total.data() + i, length - i, 0), length - i);
  }
}

}  // namespace margin_kernels::MK_ISA
