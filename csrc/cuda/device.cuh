// What the kernels share: launches, 16-byte loads, conversions and reductions over a warp.
//
// No torch header, and inline PTX beside a plain twin alone: g++ compiles the same kernels against tests/cpp/cuda_on_cpu.h, and the tests run
// them without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MK_UNROLL _Pragma("unroll")
#define MK_ROLLED _Pragma("unroll 1")
#define MK_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char mk_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(mk_shared_bytes)
#else
#include "cuda_on_cpu.h"

#define MK_UNROLL _Pragma("GCC unroll 16")
#define MK_ROLLED
#define MK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared())
#endif

// An invalid target gives NaN in its row. Compiled with MARGIN_KERNELS_DEVICE_ASSERT it stops the kernel instead, which
// names the line and leaves the device unusable for the rest of the process.
#if defined(MARGIN_KERNELS_DEVICE_ASSERT) && defined(__CUDACC__)
#include <cassert>
#define MK_DEVICE_ASSERT(condition) assert(condition)
#else
#define MK_DEVICE_ASSERT(condition) ((void)0)
#endif

namespace margin_kernels::cuda {

using half = __half;
using bfloat16 = __nv_bfloat16;

#if defined(__CUDACC__)
// launch(kernel, grid, block, shared_bytes, arguments...) on one stream. What decides between kernels and sizes takes
// the launcher as an argument, so the tests run the same decisions with cuda_on_cpu::Launch.
struct Launch {
  cudaStream_t stream;
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  const Arguments&... arguments) const {
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  }
};
#endif

constexpr uint32_t kWarp = 0xffffffffu;

// The type of sums, norms and losses: float64 for float64, float32 for all others.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(half x) { return __half2float(x); }
__device__ __forceinline__ float widen(bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(acc_t<T> x) {
  if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// The larger one, NaN where one is NaN.
__device__ __forceinline__ double max_or_nan(double a, double b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return b > a || b != b ? b : a;
#endif
}

// 2^x, a float32 below 2^-126 as 0. Without .ftz every power takes two multiplications more.
__device__ __forceinline__ double exp2_flushed(double x) { return std::exp2(x); }
__device__ __forceinline__ float exp2_flushed(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// a b, which no addition beside it takes into an fma.
__device__ __forceinline__ double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// 16 bytes of a row. Which elements a thread takes depends on their place in the row, never on the address, so that the
// order of a sum does not change with the alignment; rows that do not begin at a multiple of 16 bytes are read in
// smaller words.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T data[size];
};

// The word in which a row at `address` is read, or every row, `stride` elements apart: 16, 4 or sizeof(T) bytes.
template <class T>
__host__ __device__ inline int word_of(const T* address, int64_t stride = 0) {
  const auto place = reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(stride) * sizeof(T);
  if (place % 16 == 0) return 16;
  return place % 4 == 0 && sizeof(T) <= 4 ? 4 : static_cast<int>(sizeof(T));
}

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int word) {
  Pack<T> pack;
  if (word == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(static_cast<void*>(&pack), &bits, 16);
  } else if (sizeof(T) == 2 && word == 4) {
    uint32_t bits[4];
    MK_UNROLL
    for (int i = 0; i < 4; ++i) bits[i] = __ldg(reinterpret_cast<const uint32_t*>(from) + i);
    memcpy(static_cast<void*>(&pack), bits, 16);
  } else {
    MK_UNROLL
    for (int i = 0; i < Pack<T>::size; ++i) pack.data[i] = from[i];
  }
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack, int word) {
  if (word == 16) {
    uint4 bits;
    memcpy(&bits, static_cast<const void*>(&pack), 16);
    __stcs(reinterpret_cast<uint4*>(to), bits);  // nvcc takes an assignment apart, into four stores of 4 bytes
  } else if (sizeof(T) == 2 && word == 4) {
    uint32_t bits[4];
    memcpy(bits, static_cast<const void*>(&pack), 16);
    MK_UNROLL
    for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(to)[i] = bits[i];
  } else {
    MK_UNROLL
    for (int i = 0; i < Pack<T>::size; ++i) to[i] = pack.data[i];
  }
}

// x itself, of which the compiler knows nothing: what is computed from it is computed anew, where it would keep the
// results of an earlier time in registers.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
__device__ __forceinline__ float opaque(float x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}
__device__ __forceinline__ double opaque(double x) { return x; }

// A value of a multiple of 16 bytes in loads of 16.
template <class V>
__device__ __forceinline__ V load_whole(const V* from) {
  static_assert(alignof(V) % 16 == 0 && std::is_trivially_copyable_v<V>);
  uint4 bits[sizeof(V) / 16];
  MK_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(V) / 16); ++i) bits[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  V value;
  memcpy(static_cast<void*>(&value), bits, sizeof(V));
  return value;
}

// combine() over `width` neighbouring lanes, in a fixed order; every lane gets the result.
template <class T, class Combine>
__device__ __forceinline__ T reduce_lanes(T value, int width, const Combine& combine) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kWarp, value, offset));
  }
  return value;
}

template <class T>
__device__ __forceinline__ T sum_lanes(T value, int width = 32) {
  return reduce_lanes(value, width, [](T a, T b) { return a + b; });
}

}  // namespace margin_kernels::cuda
