// Vectors of 16 lanes (8 for float64) in the vector extension of GCC and Clang, and the instruction set to use.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors are passed between inlined functions only, so the calling convention that this warns about is never used.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace margin_kernels::simd {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

enum class InstructionSet { BASELINE, AVX2, AVX512 };

// The best that this processor has; MARGIN_KERNELS_ISA=baseline|avx2 asks for less, for tests.
inline InstructionSet instruction_set() {
  static const InstructionSet best = [] {
#if defined(__x86_64__)
    const char* asked = std::getenv("MARGIN_KERNELS_ISA");
    const std::string_view limit = asked ? asked : "";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && limit != "baseline";
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && limit != "avx2";
    if (avx512) return InstructionSet::AVX512;
    if (avx2) return InstructionSet::AVX2;
#endif
    return InstructionSet::BASELINE;
  }();
  return best;
}

}  // namespace margin_kernels::simd
