// A row of logits in the registers of the lanes that share it: its maximum, its sum of exponentials, its k best.
//
// `width` lanes hold `packs` packs each. Pack l of a lane begins at class (l width + lane) size, so neighbouring lanes
// read neighbouring packs, and what a lane holds depends on no address. Everything is unrolled: an index that the
// compiler does not know would put the row into local memory.
#pragma once

#include "../math/competitors.h"
#include "device.cuh"

namespace margin_kernels::cuda {

constexpr int kNoClass = 0x7fffffff;

template <class acc>
__device__ constexpr acc infinite() {
  return static_cast<acc>(HUGE_VAL);
}

// -------------------------------------------------------------------------------------------------------- registers

// A register of the row: one number, or two of 2 bytes that are compared in one instruction. Comparisons with NaN are
// false, and larger() is the number where one is NaN.
template <class T>
struct Word {
  using type = T;
  static constexpr int parts = 1;
  static __device__ type masked() { return -infinite<T>(); }
  static __device__ T larger(T a, T b) { return a > b ? a : b; }
  static __device__ bool reaches(T a, T least) { return a >= least; }
  static __device__ T part(T word, int) { return word; }
  static __device__ T both(T value) { return value; }
  static __device__ T without(T, int) { return -infinite<T>(); }
  static __device__ T with(T, int, T value) { return value; }
};

template <>
__device__ __forceinline__ float Word<float>::larger(float a, float b) {
  return fmaxf(a, b);
}

template <>
__device__ __forceinline__ double Word<double>::larger(double a, double b) {
  return fmax(a, b);
}

template <class T>
struct HalfWord {
  using Pair = std::conditional_t<std::is_same_v<T, half>, __half2, __nv_bfloat162>;
  using type = uint32_t;
  static constexpr int parts = 2;
  static constexpr uint32_t kMasked = std::is_same_v<T, half> ? 0xfc00 : 0xff80;

  static __device__ Pair pair(uint32_t word) {
    Pair two;
    memcpy(static_cast<void*>(&two), &word, 4);
    return two;
  }
  static __device__ uint32_t word(Pair two) {
    uint32_t bits;
    memcpy(&bits, static_cast<const void*>(&two), 4);
    return bits;
  }
  static __device__ uint32_t masked() { return kMasked << 16 | kMasked; }
  static __device__ uint32_t larger(uint32_t a, uint32_t b) { return word(__hmax2(pair(a), pair(b))); }
  static __device__ bool reaches(uint32_t a, uint32_t least) { return __hge2_mask(pair(a), pair(least)) != 0; }
  static __device__ float part(uint32_t word, int h) { return widen(h == 0 ? pair(word).x : pair(word).y); }
  static __device__ uint32_t both(float value) {
    Pair two;
    two.x = two.y = narrow<T>(value);
    return word(two);
  }
  static __device__ uint32_t without(uint32_t word, int h) { return placed(word, h, kMasked); }
  static __device__ uint32_t with(uint32_t word, int h, T value) {
    uint16_t bits;
    memcpy(&bits, static_cast<const void*>(&value), 2);
    return placed(word, h, bits);
  }

 private:
  static __device__ uint32_t placed(uint32_t word, int h, uint32_t bits) {
    return h == 0 ? (word & 0xffff0000u) | bits : (word & 0xffffu) | bits << 16;
  }
};

template <>
struct Word<half> : HalfWord<half> {};
template <>
struct Word<bfloat16> : HalfWord<bfloat16> {};

// A pack of words to shared memory, in one store.
template <class T>
__device__ __forceinline__ void store_words(Pack<T>* to, const float (&words)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(words[0], words[1], words[2], words[3]);
}
template <class T>
__device__ __forceinline__ void store_words(Pack<T>* to, const double (&words)[2]) {
  *reinterpret_cast<double2*>(to) = make_double2(words[0], words[1]);
}
template <class T>
__device__ __forceinline__ void store_words(Pack<T>* to, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// ------------------------------------------------------------------------------------------------------ exponentials

// exp(z - max) of a row is 2^(z log2(e) - shift) with shift = max log2(e), rounded: one multiply-add for a logit. The
// rounding of shift leaves the same factor in every term; correction() takes it out of the sum. It is only harmless
// where it is small: for large logits the difference is formed first.
template <class acc>
struct Exponential {  // float
  static constexpr float kScale = 1.44269504f;
  float max, shift;
  bool large;
  __device__ __forceinline__ explicit Exponential(float max_)
      : max(max_), shift(max_ * kScale), large(!(fabsf(max_) < 1048576.0f)) {}
  template <bool large_>
  __device__ __forceinline__ float of(float z) const {
    return exp2_flushed(large_ ? (z - max) * kScale : fmaf(z, kScale, -shift));
  }
  // 2^(shift - max log2(e)): the argument is at most half a unit in the last place of shift.
  __device__ __forceinline__ float correction() const {
    return large ? 1.0f : exp2_flushed(-fmaf(max, kScale, -shift));
  }
};

template <>
struct Exponential<double> {
  static constexpr bool large = false;
  double max;
  __device__ __forceinline__ explicit Exponential(double max_) : max(max_) {}
  template <bool large_>
  __device__ __forceinline__ double of(double z) const {
    return exp(z - max);
  }
  __device__ __forceinline__ double correction() const { return 1.0; }
};

// --------------------------------------------------------------------------------------------------------- the row

template <class T, int width, int packs>
struct HeldRow {
  using acc = acc_t<T>;
  using W = Word<T>;
  using word = typename W::type;
  static constexpr int size = Pack<T>::size, words = size / W::parts, stride = width * size;

  word z[packs][words];
  word top[packs];  // the largest of each pack, by find_maximum()
  int lane;

  __device__ __forceinline__ explicit HeldRow(int lane_) : lane(lane_) {}

  __device__ __forceinline__ int first_class(int pack) const { return pack * stride + lane * size; }

  // The first `classes` logits at `row`, -inf behind them. Of every lane the first `whole` packs lie within.
  template <int whole>
  __device__ __forceinline__ void load(const T* row, int classes, int word_bytes) {
    const T* from = row + lane * size;
    if (word_bytes == 16) {
      load_words<whole, 16>(from, classes);
    } else if (sizeof(T) == 2 && word_bytes == 4) {
      load_words<whole, sizeof(word)>(from, classes);
    } else {
      load_words<whole, sizeof(T)>(from, classes);
    }
    if constexpr (W::parts > 1) {
      // Else halves are taken apart where they are loaded, and each has a register of its own from there on.
      MK_UNROLL
      for (int l = 0; l < packs; ++l) {
        MK_UNROLL
        for (int w = 0; w < words; ++w) z[l][w] = opaque(z[l][w]);
      }
    }
  }

  // Takes class y out of the row. Its logit, in the lane that held it.
  __device__ __forceinline__ acc take(unsigned y) {
    const unsigned pack = y / size, place = y % size;
    const int mine = pack % width == static_cast<unsigned>(lane) ? static_cast<int>(pack / width) : -1;
    const int at = static_cast<int>(place / W::parts);
    word held = W::masked();
    MK_UNROLL
    for (int l = 0; l < packs; ++l) {
      if (l != mine) continue;
      MK_UNROLL
      for (int w = 0; w < words; ++w) held = w == at ? z[l][w] : held;
      const word left = W::without(held, place % W::parts);
      MK_UNROLL
      for (int w = 0; w < words; ++w) z[l][w] = w == at ? left : z[l][w];
    }
    return opaque(W::part(held, place % W::parts));
  }

  // sum of exp(z - max) over this lane. NaN where a logit is NaN, or max is +inf.
  __device__ __forceinline__ acc sum(const Exponential<acc>& exponential) const {
    return exponential.large ? sum_of<true>(exponential) : sum_of<false>(exponential);
  }

  // Of the finite logits of this lane: how many there are, and the sum of max - z.
  __device__ __forceinline__ void deficit_and_count(acc max, acc& deficit, acc& count) const {
    each([&](int, acc v) {
      if (!(v > -infinite<acc>())) return;
      deficit += max - v;
      count += acc(1);
    });
  }

  // body(class, logit) for those of at least `least`, a finite number of type T; call after find_maximum().
  template <class Body>
  __device__ __forceinline__ void each_from(acc least, const Body& body) const {
    const word both = W::both(least);
    MK_UNROLL
    for (int l = 0; l < packs; ++l) {
      if (!W::reaches(top[l], both)) continue;
      const int first = static_cast<int>(opaque(static_cast<uint32_t>(first_class(l))));
      MK_UNROLL
      for (int w = 0; w < words; ++w) {
        if (W::parts > 1 && !W::reaches(z[l][w], both)) continue;
        const word rare = W::parts > 1 ? opaque(z[l][w]) : z[l][w];
        MK_UNROLL
        for (int h = 0; h < W::parts; ++h) {
          const acc v = W::part(rare, h);
          if (v >= least) body(first + w * W::parts + h, v);
        }
      }
    }
  }

  // body(first class, words) for the packs with such a logit.
  template <class Body>
  __device__ __forceinline__ void each_pack_from(acc least, const Body& body) const {
    const word both = W::both(least);
    MK_UNROLL
    for (int l = 0; l < packs; ++l) {
      if (W::reaches(top[l], both)) body(first_class(l), z[l]);
    }
  }

  // Of this lane, without NaN. Sets top.
  __device__ __forceinline__ acc find_maximum() {
    MK_UNROLL
    for (int l = 0; l < packs; ++l) update_top(l);
    return maximum();
  }

  // Takes out a class that this lane holds; top stays right.
  __device__ __forceinline__ void remove(int i) {
    take(static_cast<unsigned>(i));
    const int pack = i / stride;
    MK_UNROLL
    for (int l = 0; l < packs; ++l) {
      if (l == pack) update_top(l);
    }
  }

  // Of what is left in this lane.
  __device__ __forceinline__ acc maximum() const {
    word largest = top[0];
    MK_UNROLL
    for (int l = 1; l < packs; ++l) largest = W::larger(largest, top[l]);
    return larger_part(largest);
  }

 private:
  // Often the last pack alone is cut: then no other is checked.
  template <int whole, int word_bytes>
  __device__ __forceinline__ void load_words(const T* from, int classes) {
    load_packs<true, word_bytes, 0>(from, classes, std::make_integer_sequence<int, whole>());
    if constexpr (whole < packs) {
      constexpr std::make_integer_sequence<int, packs - 1 - whole> others{};
      if (classes >= (packs - 1) * stride) {
        load_packs<true, word_bytes, whole>(from, classes, others);
      } else {
        load_packs<false, word_bytes, whole>(from, classes, others);
      }
      load_one<false, word_bytes, packs - 1>(from, classes - first_class(packs - 1));
    }
  }
  template <bool whole, int word_bytes, int first, int... l>
  __device__ __forceinline__ void load_packs(const T* from, int classes, std::integer_sequence<int, l...>) {
    (load_one<whole, word_bytes, first + l>(from, classes - first_class(first + l)), ...);
  }

  // Pack l, of which `left` logits belong to the row.
  template <bool whole, int word_bytes, int l>
  __device__ __forceinline__ void load_one(const T* from, int left) {
    constexpr int at = l * stride;
    if (!whole && left < size) {
      MK_UNROLL
      for (int w = 0; w < words; ++w) z[l][w] = W::masked();
      MK_UNROLL
      for (int j = 0; j + 1 < size; ++j) {
        if (j < left) z[l][j / W::parts] = W::with(z[l][j / W::parts], j % W::parts, __ldg(from + at + j));
      }
    } else if constexpr (word_bytes == 16) {
      using Words = std::conditional_t<sizeof(T) == 8, double2, std::conditional_t<sizeof(T) == 4, float4, uint4>>;
      const Words& four = reinterpret_cast<const Words*>(from)[at / size];
      z[l][0] = four.x;
      z[l][1] = four.y;
      if constexpr (words == 4) {
        z[l][2] = four.z;
        z[l][3] = four.w;
      }
    } else if constexpr (word_bytes == sizeof(word)) {
      MK_UNROLL
      for (int w = 0; w < words; ++w) z[l][w] = __ldg(reinterpret_cast<const word*>(from + at) + w);
    } else {
      MK_UNROLL
      for (int j = 0; j < size; ++j) {
        z[l][j / W::parts] = W::with(z[l][j / W::parts], j % W::parts, __ldg(from + at + j));
      }
    }
  }

  __device__ __forceinline__ void update_top(int l) {
    top[l] = z[l][0];
    MK_UNROLL
    for (int w = 1; w < words; ++w) top[l] = W::larger(top[l], z[l][w]);
    if constexpr (W::parts == 1) top[l] = opaque(top[l]);  // else it is computed once more where it is used
  }

  static __device__ __forceinline__ acc larger_part(word largest) {
    if constexpr (W::parts == 1) {
      return largest;
    } else {
      return fmaxf(W::part(largest, 0), W::part(largest, 1));
    }
  }

  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    MK_UNROLL
    for (int l = 0; l < packs; ++l) {
      MK_UNROLL
      for (int w = 0; w < words; ++w) {
        MK_UNROLL
        for (int h = 0; h < W::parts; ++h) body((l * words + w) * W::parts + h, W::part(z[l][w], h));
      }
    }
  }

  template <bool large>
  __device__ __forceinline__ acc sum_of(const Exponential<acc>& exponential) const {
    acc sums[4] = {0, 0, 0, 0};
    each([&](int e, acc v) { sums[e % 4] += exponential.template of<large>(v); });
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

}  // namespace margin_kernels::cuda
