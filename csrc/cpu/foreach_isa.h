// Compiles MK_KERNEL once per instruction set, each in a namespace of its own, and picks the best at run time.
//
//   #define MK_KERNEL "X_kernel.h"
//   #include "foreach_isa.h"
//   MK_DISPATCH(rows<float>(arguments));          calls avx512::rows<float>, avx2::rows<float> or baseline::rows<float>
//
// Every function in a kernel file is marked MK_FN. No include guard, on purpose: one inclusion per kernel.

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MK_X86 1
#else
#define MK_X86 0
#endif

#include "simd_types.h"

#if MK_X86
#define MK_ISA avx512
#define MK_HAS_AVX512 1
#define MK_HAS_F16C 1
#define MK_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "simd.h"
#include MK_KERNEL
#undef MK_ISA
#undef MK_HAS_AVX512
#undef MK_HAS_F16C
#undef MK_TARGET

#define MK_ISA avx2
#define MK_HAS_AVX512 0
#define MK_HAS_F16C 1
#define MK_TARGET __attribute__((target("avx2,fma,f16c")))
#include "simd.h"
#include MK_KERNEL
#undef MK_ISA
#undef MK_HAS_AVX512
#undef MK_HAS_F16C
#undef MK_TARGET
#endif

#define MK_ISA baseline
#define MK_HAS_AVX512 0
#define MK_HAS_F16C 0
#define MK_TARGET
#include "simd.h"
#include MK_KERNEL
#undef MK_ISA
#undef MK_HAS_AVX512
#undef MK_HAS_F16C
#undef MK_TARGET

#if MK_X86
#define MK_DISPATCH(...)                                   \
  do {                                                     \
    switch (::margin_kernels::simd::instruction_set()) {   \
      case ::margin_kernels::simd::InstructionSet::AVX512: \
        avx512::__VA_ARGS__;                               \
        break;                                             \
      case ::margin_kernels::simd::InstructionSet::AVX2:   \
        avx2::__VA_ARGS__;                                 \
        break;                                             \
      default:                                             \
        baseline::__VA_ARGS__;                             \
    }                                                      \
  } while (0)
#else
#define MK_DISPATCH(...) baseline::__VA_ARGS__
#endif
