// The input gradient of a convolution with few input channels, stride 1. Included once per instruction set.
//
// A band of rows of one sample's g lies in a padded copy, so that every load is unconditional. A tile of the gradient,
// kRows rows of two vectors, stays in registers over all output channels and all places of the kernel: a vector of g,
// loaded once for a column of the kernel, serves every row of the tile that it reaches through that column.

namespace margin_kernels::MK_ISA {

#if MK_HAS_AVX512
constexpr int kVectorBytes = 64, kRows = 8;  // 16 sums, 5 weights and 2 vectors of g in 32 registers
#elif MK_HAS_F16C
constexpr int kVectorBytes = 32, kRows = 4;  // 16 registers
#else
constexpr int kVectorBytes = 16, kRows = 4;
#endif

constexpr int64_t kBandBytes = 512 << 10;

// One register: the vectors of simd.h take several where there is no AVX-512.
template <class scalar_t>
struct Register {
  typedef scalar_t vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t width = kVectorBytes / sizeof(scalar_t);
};
template <class scalar_t>
using register_of = typename Register<scalar_t>::vector;

// Keeps a value in its register. Without it GCC reads a vector of g from memory anew for each product, two cycles for
// one where it crosses a cache line, and makes a call of a copy of a short row.
template <class vector>
MK_FN void keep(vector& v) {
#if MK_X86
  asm volatile("" : "+v"(v));
#else
  (void)v;
#endif
}

// Adds to a tile the part of A rows of one output channel's kernel, the first at w; g is the row that the last of them
// brings to the tile's first row.
template <int A, int V, int R, class scalar_t>
MK_FN void add_kernel_rows(const ThinConvolution& at, const scalar_t* g, int64_t stride, const scalar_t* w,
                           register_of<scalar_t> (&sums)[R][V]) {
  using vector = register_of<scalar_t>;
  for (int64_t b = 0; b < at.kw; ++b) {
    const scalar_t* from = g + (at.kw - 1 - b) * at.dilation_w;
    vector weight[A];
#pragma GCC unroll 16
    for (int a = 0; a < A; ++a) {
      weight[a] = vector{} + w[a * at.kw + b];
#if MK_HAS_AVX512
      keep(weight[a]);
#endif
    }
#pragma GCC unroll 16
    for (int r = 0; r < R + A - 1; ++r) {
      vector row[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        row[v] = read<vector>(from + r * stride + v * Register<scalar_t>::width);
        keep(row[v]);
      }
#pragma GCC unroll 16
      for (int a = A - 1; a >= 0; --a) {
        const int i = r - (A - 1 - a);
        if (i < 0 || i >= R) continue;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[i][v] += weight[a] * row[v];
      }
    }
  }
}

// R rows of V vectors of the gradient of one sample and input channel; g is the corner of the tile in the padded planes
// and `stride` the step to the next of its rows there. Meanwhile `ahead` bytes for each output channel are asked for.
template <int V, int R, class scalar_t>
MK_TARGET __attribute__((noinline)) void tile(const ThinConvolution& at, const scalar_t* g, int64_t stride,
                                              int64_t plane, const scalar_t* w, scalar_t* dx, int64_t rows,
                                              int64_t columns, const char* next, int64_t ahead) {
  const int64_t channel = at.gh * at.gw * int64_t{sizeof(scalar_t)};
  register_of<scalar_t> sums[R][V] = {};
  for (int64_t co = 0; co < at.outputs; ++co, next += channel, g += plane, w += at.inputs * at.kh * at.kw) {
    for (int64_t k = 0; k < ahead; k += 64) __builtin_prefetch(next + k, 0, 2);
    for (int64_t a = 0, count; a < at.kh; a += count) {
      count = std::min<int64_t>(at.kh - a, 5);
      const scalar_t *from = g + (at.kh - a - count) * stride, *weight = w + a * at.kw;
      switch (count) {
        case 1:
          add_kernel_rows<1>(at, from, stride, weight, sums);
          break;
        case 2:
          add_kernel_rows<2>(at, from, stride, weight, sums);
          break;
        case 3:
          add_kernel_rows<3>(at, from, stride, weight, sums);
          break;
        case 4:
          add_kernel_rows<4>(at, from, stride, weight, sums);
          break;
        default:
          add_kernel_rows<5>(at, from, stride, weight, sums);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    if (i == rows) break;
    scalar_t line[V * Register<scalar_t>::width];
    std::memcpy(line, sums[i], sizeof(line));
    std::memcpy(dx + i * at.dilation_h * at.w, line, columns * sizeof(scalar_t));
  }
}

// n elements, by whole vectors where there is one: the last overlaps the one before.
template <class scalar_t>
MK_FN void copy_row(const scalar_t* from, int64_t n, scalar_t* to) {
  using vector = register_of<scalar_t>;
  constexpr int64_t L = Register<scalar_t>::width;
  if (n < L) {
    for (int64_t j = 0; j < n; ++j) to[j] = from[j];
    return;
  }
  for (int64_t j = 0; j < n; j += L) {
    const int64_t at = std::min(j, n - L);
    auto v = read<vector>(from + at);
    keep(v);
    std::memcpy(to + at, &v, sizeof(v));
  }
}

// dx[n] for n in [begin, end)
template <class scalar_t>
MK_TARGET void input_gradient_samples(const ThinConvolution& at, const scalar_t* g, const scalar_t* w, int64_t begin,
                                      int64_t end, scalar_t* dx) {
  constexpr int64_t L = Register<scalar_t>::width, R = kRows;
  const int64_t span_h = (at.kh - 1) * at.dilation_h, span_w = (at.kw - 1) * at.dilation_w;
  const int64_t top = at.padding_h - span_h, left = at.padding_w - span_w;  // where the padded planes begin in g
  const int64_t column = std::max<int64_t>(left, 0), columns = std::min(at.gw, at.w + at.padding_w) - column;
  const int64_t stride = (at.w + L - 1) / L * L + span_w;
  // Rows of dx whose rows of g are copied at once: as many tiles high as the second-level cache holds.
  const int64_t step = R * at.dilation_h, fitting = kBandBytes / (at.outputs * stride * int64_t{sizeof(scalar_t)});
  const int64_t band = std::clamp((fitting - span_h) / step, int64_t{1}, (at.h + step - 1) / step) * step;
  const int64_t bands = (at.h + band - 1) / band, plane = (band + span_h) * stride;
  // What a tile asks for of the next band, for each output channel.
  const int64_t tiles = at.inputs * band / R * ((at.w + 2 * L - 1) / (2 * L));
  const int64_t share = band * at.gw * int64_t{sizeof(scalar_t)} / tiles;
  std::vector<scalar_t> padded(at.outputs * plane);
  // The rows of g that a band starting at row i of dx reads, as far as there are any.
  const auto first_row = [&](int64_t i) MK_TARGET { return std::clamp<int64_t>(i + top, 0, at.gh); };
  const auto row_end = [&](int64_t i) MK_TARGET { return std::clamp<int64_t>(i + top + band + span_h, 0, at.gh); };
  for (int64_t place = begin * bands; place < end * bands; ++place) {
    const int64_t n = place / bands, start = place % bands * band, stop = std::min(start + band, at.h);
    const scalar_t* sample = g + n * at.outputs * at.gh * at.gw;
    const int64_t first = first_row(start), last = row_end(start);
    for (int64_t co = 0; co < at.outputs; ++co) {
      scalar_t* to = padded.data() + co * plane;
      if (bands > 1) std::fill_n(to, (first - start - top) * stride, scalar_t(0));
      for (int64_t r = first; r < last; ++r) {
        copy_row(sample + (co * at.gh + r) * at.gw + column, columns, to + (r - start - top) * stride + column - left);
      }
      if (bands > 1) std::fill(to + (last - start - top) * stride, to + plane, scalar_t(0));
    }
    const bool more = place + 1 < end * bands;
    const int64_t ahead = more ? share : 0, following = (place + 1) % bands * band;
    auto* next = reinterpret_cast<const char*>(
        more ? g + ((place + 1) / bands * at.outputs * at.gh + first_row(following)) * at.gw : g);
    for (int64_t ci = 0; ci < at.inputs; ++ci) {
      const scalar_t* weight = w + ci * at.kh * at.kw;
      for (int64_t phase = start; phase < std::min(start + at.dilation_h, stop);
           ++phase) {  // rows that share rows of g
        for (int64_t i = phase; i < stop; i += step) {
          const int64_t rows = (stop - i + at.dilation_h - 1) / at.dilation_h;
          for (int64_t j = 0; j < at.w; j += 2 * L, next += ahead) {
            const int64_t wide = std::min(at.w - j, 2 * L);
            const auto run = [&](auto vectors, auto height) MK_TARGET {
              constexpr int V = decltype(vectors)::value, H = decltype(height)::value;
              tile<V, H>(at, padded.data() + (i - start) * stride + j, at.dilation_h * stride, plane, weight,
                         dx + ((n * at.inputs + ci) * at.h + i) * at.w + j, std::min<int64_t>(rows, H), wide, next,
                         ahead);
            };
            const auto by_height = [&](auto vectors) MK_TARGET {
              rows > R / 2 ? run(vectors, std::integral_constant<int, R>())
                           : run(vectors, std::integral_constant<int, R / 2>());
            };
            wide > L ? by_height(std::integral_constant<int, 2>()) : by_height(std::integral_constant<int, 1>());
          }
        }
      }
    }
  }
}

}  // namespace margin_kernels::MK_ISA
