// Norms of row differences. The difference of a pair lies in a buffer of one row, which stays in the first-level cache;
// what costs is the gather of the rows from memory, so rows are asked for five visits before their turn, into the
// second-level cache (the first has too few misses in flight: half the speed). Included once per instruction set.

#include "dual_norm_kernel.h"

namespace margin_kernels::MK_ISA {

constexpr int64_t kVisitsAhead = 5, kBytesAhead = 8192;  // beyond 8 KiB of a row the processor sees the stream itself

// Asks for the row that is the place-th of all in the order of their first use: each sample's label, then its k
// competitors. MK_FN matters: GCC takes a function that only prefetches for one without effect, and drops its calls.
template <class scalar_t>
MK_FN void ask_for(const RowPairs<scalar_t>& at, int64_t place, int64_t end) {
  const int64_t n = place / (at.k + 1), j = place % (at.k + 1);
  if (n >= end) return;
  const auto* row = reinterpret_cast<const char*>(at.row(j == 0 ? at.target[n] : at.index[n * at.k + j - 1]));
  const int64_t size = std::min(at.length * static_cast<int64_t>(sizeof(scalar_t)), kBytesAhead);
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// to = a - b [n], in float32 (float64 for double)
template <class scalar_t>
MK_FN void difference(const scalar_t* a, const scalar_t* b, int64_t n, typename Lane<scalar_t>::acc* to) {
  constexpr int64_t W = Lane<scalar_t>::width;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(a + i) - load(b + i));
  if (i < n) store_part(to + i, load_part(a + i, n - i, 0) - load_part(b + i, n - i, 0), n - i);
}

// norm[n, :] for n in [begin, end)
template <Norm norm, class scalar_t>
MK_TARGET void distance_rows(const RowPairs<scalar_t>& at, int64_t begin, int64_t end, double q,
                             typename Lane<scalar_t>::acc* norms) {
  using acc = typename Lane<scalar_t>::acc;
  std::vector<acc> buffer(at.length);
  const int64_t first = begin * at.k, last = end * at.k - 1, k = at.k;
  const auto row = [&](int64_t i) MK_TARGET {
    const int64_t pair = first + i, n = pair / k, j = pair % k, place = n * (k + 1) + j;
    if (j == 0) ask_for(at, place + kVisitsAhead, end);
    ask_for(at, place + 1 + kVisitsAhead, end);
    difference(at.row(at.index[pair]), at.row(at.target[n]), at.length, buffer.data());
    return static_cast<const acc*>(buffer.data());
  };
  norms_of<norm, acc>(last + 1 - first, at.length, q, row,
                      [&](int64_t i, double value) MK_TARGET { norms[first + i] = static_cast<acc>(value); });
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
      difference(a, b, length, buffer.data());
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
