// Runs CUDA kernels on the CPU: csrc/cuda/X.cuh, unmodified, includes this where nvcc does not compile it.
//
//   cuda_on_cpu::Launch launch;
//   launch(kernel<float>, grid, block, shared_bytes, arguments...);      kernel<float><<<grid, block,
//   shared_bytes>>>(...)
//
// One block at a time, each of its threads a fiber that runs until it waits: at __syncthreads for the block, at a
// shuffle, vote or __syncwarp for the lanes of its mask. Blocks and threads run in the order of `schedule()`; results
// that differ between schedules show a missing barrier. Under Schedule::SWITCHING a fiber also waits at loads and
// stores drawn by chance: compiled with -fsanitize=thread, but not linked with it, every access calls a function that
// stands here in the place of that library. Dynamic shared memory lies on the heap, exactly as long as asked for; it
// and the static one are filled with NaN (-1 as an integer) before each block. 16-byte loads check their alignment.
// With AddressSanitizer and UBSan, which exclude those switches, an access outside a tensor is found as on the host.
//
// launch() throws std::runtime_error where a block cannot go on (threads that wait at different barriers, or for one
// that has returned), where a shuffle reads a lane outside its mask, and where a launch exceeds what a device allows.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define MK_CUDA_ON_CPU 1
#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
// One block runs at a time. Thread-local, as all of those of the program lie together: see fill_static_shared().
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

// Two numbers of 2 bytes in a register.
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
namespace cuda_on_cpu {
template <class T>
T larger(T a, T b) {
  return std::fmax(static_cast<float>(a), static_cast<float>(b));
}
template <class Pair>
unsigned ge_mask(Pair a, Pair b) {
  return (static_cast<float>(a.x) >= static_cast<float>(b.x) ? 0xffffu : 0u) |
         (static_cast<float>(a.y) >= static_cast<float>(b.y) ? 0xffff0000u : 0u);
}
}  // namespace cuda_on_cpu
inline __half2 __hmax2(__half2 a, __half2 b) { return {cuda_on_cpu::larger(a.x, b.x), cuda_on_cpu::larger(a.y, b.y)}; }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {cuda_on_cpu::larger(a.x, b.x), cuda_on_cpu::larger(a.y, b.y)};
}
inline unsigned __hge2_mask(__half2 a, __half2 b) { return cuda_on_cpu::ge_mask(a, b); }
inline unsigned __hge2_mask(__nv_bfloat162 a, __nv_bfloat162 b) { return cuda_on_cpu::ge_mask(a, b); }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

#if defined(__SANITIZE_THREAD__)
#define MK_UNWATCHED __attribute__((no_sanitize_thread))
#else
#define MK_UNWATCHED
#endif

enum class Schedule { ASCENDING, DESCENDING, SHUFFLED, SWITCHING };
inline Schedule& schedule() {
  static Schedule value = Schedule::ASCENDING;
  return value;
}

// Calls body() under every schedule; under one of them where a sanitizer looks for other mistakes and makes it slow.
template <class Body>
void under_every_schedule(const Body& body) {
#if defined(__SANITIZE_ADDRESS__)
  schedule() = Schedule::SHUFFLED;
  body();
  schedule() = Schedule::ASCENDING;
  return;
#endif
  for (const auto order : {Schedule::ASCENDING, Schedule::DESCENDING, Schedule::SHUFFLED, Schedule::SWITCHING}) {
#if !defined(__SANITIZE_THREAD__)
    if (order == Schedule::SWITCHING) continue;
#endif
    schedule() = order;
    body();
  }
  schedule() = Schedule::ASCENDING;
}

// Fills the thread-local variables of this program, not those of its libraries: they are the static shared memory.
inline void fill_static_shared() {
  static const auto [first, size] = [] {
    std::pair<void*, size_t> block{nullptr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* program, size_t, void* out) {
          for (int i = 0; i < program->dlpi_phnum; ++i) {
            if (program->dlpi_phdr[i].p_type != PT_TLS) continue;
            *static_cast<std::pair<void*, size_t>*>(out) = {program->dlpi_tls_data, program->dlpi_phdr[i].p_memsz};
          }
          return 1;  // the program comes first
        },
        &block);
    return block;
  }();
  if (first != nullptr) std::memset(first, 0xff, size);
}

// Whether an access may switch threads: it is one of a kernel, not of what stands here.
inline bool in_kernel = false;
MK_UNWATCHED inline void leave_kernel() { in_kernel = false; }
MK_UNWATCHED inline void enter_kernel() { in_kernel = schedule() == Schedule::SWITCHING; }

enum class Collective { SHUFFLE, BALLOT, SYNC };

struct Thread {
  enum State { READY, AT_BARRIER, AT_COLLECTIVE, DONE };
  ucontext_t context;
  jmp_buf jump;
  bool begun;
  std::unique_ptr<char[]> stack;
  uint3 index;
  State state = READY;
  std::source_location where;  // of the barrier it waits at
  Collective kind;             // of the collective it waits at
  uint32_t mask;
  uint64_t value, result;  // what it brings to the collective (or barrier) and what it takes away
  int source;              // lane that a shuffle reads
};

class Block {
 public:
  static constexpr size_t kStack = 256 << 10;

  static Block& running() {
    static Block block;
    return block;
  }

  void run(uint3 block, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
    blockIdx = block;
    blockDim = threads;
    kernel_ = &kernel;
    count_ = threads.x * threads.y * threads.z;
    shared_ = std::make_unique_for_overwrite<char[]>(shared_bytes);
    std::memset(shared_.get(), 0xff, shared_bytes);
    fill_static_shared();
    for (size_t t = threads_.size(); t < count_; ++t) {
      threads_.push_back(std::make_unique<Thread>());
      threads_[t]->stack = std::make_unique_for_overwrite<char[]>(kStack);
    }
    for (unsigned t = 0; t < count_; ++t) {
      Thread& thread = *threads_[t];
      thread.index = {t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y};
      if (thread.state != Thread::DONE) begin(thread);
      thread.state = Thread::READY;
    }
    at_barrier_ = 0;
    waiting_.assign((count_ + 31) / 32, 0);
    order_.resize(count_);
    std::iota(order_.begin(), order_.end(), 0u);
    if (schedule() == Schedule::DESCENDING) std::reverse(order_.begin(), order_.end());
    std::mt19937 random(count_ + 31 * block.x);
    draws_.seed(count_ + 31 * block.x);
    until_switch_ = 1;
    for (bool progress = true; progress;) {
      if (schedule() >= Schedule::SHUFFLED) std::shuffle(order_.begin(), order_.end(), random);
      progress = false;
      for (const unsigned t : order_) {
        if (threads_[t]->state != Thread::READY) continue;
        progress = true;
        resume(*threads_[t]);
        if (!error_.empty()) throw std::runtime_error(std::exchange(error_, {}));
      }
    }
    stuck();
  }

  Thread& thread() { return *current_; }
  unsigned lane() const { return linear(current_->index) % 32; }
  void* shared() { return shared_.get(); }

  // At a load or store of a kernel: now and then the other threads go on first.
  MK_UNWATCHED void access() {
    if (--until_switch_ > 0) return;
    in_kernel = false;
    until_switch_ = 1 + static_cast<int>(draws_() % 64);
    leave();
    in_kernel = true;
  }

  // Waits for every thread of the block; the sum of what they bring.
  uint64_t barrier(uint64_t value, std::source_location where) {
    leave_kernel();
    current_->where = where;
    current_->value = value;
    current_->state = Thread::AT_BARRIER;
    if (++at_barrier_ == count_) {
      at_barrier_ = 0;
      for (unsigned t = 0; t < count_; ++t) {
        const auto& there = threads_[t]->where;
        if (there.line() != where.line() || std::strcmp(there.file_name(), where.file_name()) != 0) {
          fail("threads wait at different barriers: " + name(there) + " and " + name(where));
        }
      }
      uint64_t total = 0;
      for (unsigned t = 0; t < count_; ++t) total += threads_[t]->value;
      for (unsigned t = 0; t < count_; ++t) {
        threads_[t]->result = total;
        threads_[t]->state = Thread::READY;
      }
    }
    leave();
    const uint64_t total = current_->result;
    enter_kernel();
    return total;
  }

  // Waits for every lane of the mask; a shuffle gives the value of lane `source`, a ballot the bits of all.
  uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int source) {
    leave_kernel();
    Thread& me = *current_;
    if ((mask >> lane() & 1) == 0) fail("a lane is not in its own mask");
    me.kind = kind;
    me.mask = mask;
    me.value = value;
    me.source = source;
    me.state = Thread::AT_COLLECTIVE;
    const unsigned first = linear(me.index) / 32 * 32;
    uint32_t& waiting = waiting_[first / 32];
    waiting |= 1u << lane();
    if ((mask & ~waiting) == 0) {
      waiting &= ~mask;
      uint64_t bits = 0;
      for (unsigned l = 0; l < 32; ++l) {
        if ((mask >> l & 1) == 0) continue;
        const Thread& other = *threads_[first + l];
        if (other.kind != kind || other.mask != mask) fail("lanes of a mask meet with different calls or masks");
        bits |= uint64_t{other.value != 0} << l;
      }
      for (unsigned l = 0; l < 32; ++l) {
        if ((mask >> l & 1) == 0) continue;
        Thread& other = *threads_[first + l];
        if (kind == Collective::SHUFFLE) {
          if ((mask >> other.source & 1) == 0) fail("a shuffle reads a lane outside its mask");
          other.result = threads_[first + other.source]->value;
        } else {
          other.result = bits;
        }
        other.state = Thread::READY;
      }
    }
    leave();
    const uint64_t result = me.result;
    enter_kernel();
    return result;
  }

  // Ends the launch from inside a kernel: the fiber is left behind.
  void fail(const std::string& message) {
    leave_kernel();
    error_ = message + ", block " + std::to_string(blockIdx.x) + " thread " + std::to_string(linear(current_->index));
    leave();
  }

 private:
  static unsigned linear(uint3 i) { return i.x + blockDim.x * (i.y + blockDim.y * i.z); }
  static std::string name(const std::source_location& where) {
    return std::string(where.file_name()) + ":" + std::to_string(where.line());
  }

  void stuck() {
    unsigned done = 0, at_collective = 0;
    std::string where;
    for (unsigned t = 0; t < count_; ++t) {
      done += threads_[t]->state == Thread::DONE;
      at_collective += threads_[t]->state == Thread::AT_COLLECTIVE;
      if (threads_[t]->state == Thread::AT_BARRIER) where = " (" + name(threads_[t]->where) + ")";
    }
    if (done == count_) return;
    throw std::runtime_error("deadlock in block " + std::to_string(blockIdx.x) + ": " + std::to_string(done) +
                             " threads have returned, " + std::to_string(at_collective) + " wait for their warp, " +
                             std::to_string(count_ - done - at_collective) + " at a barrier" + where);
  }

  // A new fiber, or one that an error left in the middle of a kernel. Finished ones are used again as they are.
  void begin(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack.get(), kStack);
#endif
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::enter, 0);
    thread.begun = false;
  }

  void resume(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
#if defined(__SANITIZE_ADDRESS__)
    void* saved;
    __sanitizer_start_switch_fiber(&saved, thread.stack.get(), kStack);
    swapcontext(&scheduler_, &thread.context);
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#else
    // As swapcontext, without its system call for the signal mask.
    if (_setjmp(scheduler_) != 0) return;
    if (thread.begun) _longjmp(thread.jump, 1);
    thread.begun = true;
    setcontext(&thread.context);
#endif
  }

  // Back to the scheduler, until resumed.
  void leave() {
    Thread& me = *current_;
#if defined(__SANITIZE_ADDRESS__)
    void* saved;
    __sanitizer_start_switch_fiber(&saved, scheduler_stack_, scheduler_size_);
    swapcontext(&me.context, &scheduler_);
    __sanitizer_finish_switch_fiber(saved, &scheduler_stack_, &scheduler_size_);
#else
    if (_setjmp(me.jump) == 0) _longjmp(scheduler_, 1);
#endif
  }

  static void enter() {
    Block& block = running();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack_, &block.scheduler_size_);
#endif
    for (;;) {
      enter_kernel();
      (*block.kernel_)();
      leave_kernel();
      block.current_->state = Thread::DONE;
      block.leave();
    }
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<unsigned> order_;
  std::vector<uint32_t> waiting_;  // lanes of each warp that wait at a collective
  unsigned count_ = 0, at_barrier_ = 0;
  Thread* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::unique_ptr<char[]> shared_;
  std::string error_;
  int until_switch_;
  std::minstd_rand draws_;
#if defined(__SANITIZE_ADDRESS__)
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
#else
  jmp_buf scheduler_;
#endif
};

MK_UNWATCHED inline void access() {
  if (in_kernel) Block::running().access();
}

inline void* dynamic_shared() { return Block::running().shared(); }

struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  const Arguments&... arguments) const {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (threads < 1 || threads > 1024 || block.z > 64) throw std::runtime_error("a block has 1 to 1024 threads");
    if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
      throw std::runtime_error("the grid is empty or too large");
    }
    if (shared_bytes > 48 << 10) throw std::runtime_error("more than 48 KiB of dynamic shared memory");
    if ((sizeof(Parameters) + ... + 0) > 4096) throw std::runtime_error("more than 4 KiB of parameters");
    gridDim = grid;
    const std::tuple<Parameters...> parameters(arguments...);
    const std::function<void()> body = [&] { std::apply(kernel, parameters); };
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = schedule() == Schedule::DESCENDING ? blocks - 1 - i : i;
      Block::running().run({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                            static_cast<unsigned>(b / grid.x / grid.y)},
                           block, shared_bytes, body);
    }
  }
};

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle(uint32_t mask, T value, int source) {
  return from_bits<T>(Block::running().collective(Collective::SHUFFLE, mask, to_bits(value), source));
}
inline int lane() { return static_cast<int>(Block::running().lane()); }

}  // namespace cuda_on_cpu

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::Block::running().barrier(0, where);
}
inline int __syncthreads_count(int predicate, std::source_location where = std::source_location::current()) {
  return static_cast<int>(cuda_on_cpu::Block::running().barrier(predicate != 0, where));
}
inline int __syncthreads_or(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::Block::running().barrier(predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, std::source_location where = std::source_location::current()) {
  return cuda_on_cpu::Block::running().barrier(predicate == 0, where) == 0;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  cuda_on_cpu::Block::running().collective(cuda_on_cpu::Collective::SYNC, mask, 0, 0);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return static_cast<uint32_t>(
      cuda_on_cpu::Block::running().collective(cuda_on_cpu::Collective::BALLOT, mask, predicate != 0, 0));
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// `width` splits the warp into segments, as on the device; a lane whose source leaves its segment keeps its own value.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  return cuda_on_cpu::shuffle(mask, value, (cuda_on_cpu::lane() & -width) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ bits;
  return cuda_on_cpu::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source < (lane & -width) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source >= (lane & -width) ? source : lane);
}

inline int __reduce_max_sync(uint32_t mask, int value) {
  if (mask != 0xffffffffu) cuda_on_cpu::Block::running().fail("a reduction is of a whole warp here");
  for (int bits = 16; bits > 0; bits /= 2) value = std::max(value, __shfl_xor_sync(mask, value, bits));
  return value;
}

// Loads and stores with a cache hint.
template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) cuda_on_cpu::Block::running().fail("misaligned load");
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return __ldg(from);
}
template <class T>
void __stcs(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(T) != 0) cuda_on_cpu::Block::running().fail("misaligned store");
  *to = value;
}

namespace cuda_on_cpu {

// Stores f(*to); returns what was there. No other thread comes between.
template <class T, class Function>
T at_once(T* to, const Function& f) {
  leave_kernel();
  const T before = std::exchange(*to, f(*to));
  enter_kernel();
  return before;
}

}  // namespace cuda_on_cpu

// Integers only: floating point atomics would add in an order of their own.
template <class T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return cuda_on_cpu::at_once(to, [&](T x) { return x + value; });
}
inline int atomicMax(int* to, int value) {
  return cuda_on_cpu::at_once(to, [&](int x) { return std::max(x, value); });
}
inline int atomicMin(int* to, int value) {
  return cuda_on_cpu::at_once(to, [&](int x) { return std::min(x, value); });
}
inline void __threadfence() {}

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline int __clz(uint32_t bits) { return std::countl_zero(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

#if defined(__SANITIZE_THREAD__)
// What the compiler calls at loads and stores, in the place of the library of ThreadSanitizer.
#define MK_HOOK(TYPE) inline __attribute__((used)) MK_UNWATCHED TYPE
#define MK_ACCESS(NAME) \
  MK_HOOK(void) NAME(void*) { cuda_on_cpu::access(); }
#define MK_ACCESSES(SIZE)                \
  MK_ACCESS(__tsan_read##SIZE)           \
  MK_ACCESS(__tsan_write##SIZE)          \
  MK_ACCESS(__tsan_unaligned_read##SIZE) \
  MK_ACCESS(__tsan_unaligned_write##SIZE)
// Those of the headers, which no kernel uses. Always in sequence, whatever is asked for.
#define MK_ATOMICS(TYPE, BITS)                                                                                       \
  MK_HOOK(TYPE) __tsan_atomic##BITS##_load(const volatile void* from, int) {                                         \
    return __atomic_load_n(static_cast<const volatile TYPE*>(from), __ATOMIC_SEQ_CST);                               \
  }                                                                                                                  \
  MK_HOOK(void) __tsan_atomic##BITS##_store(volatile void* to, TYPE x, int) {                                        \
    __atomic_store_n(static_cast<volatile TYPE*>(to), x, __ATOMIC_SEQ_CST);                                          \
  }                                                                                                                  \
  MK_HOOK(TYPE) __tsan_atomic##BITS##_exchange(volatile void* to, TYPE x, int) {                                     \
    return __atomic_exchange_n(static_cast<volatile TYPE*>(to), x, __ATOMIC_SEQ_CST);                                \
  }                                                                                                                  \
  MK_HOOK(TYPE) __tsan_atomic##BITS##_fetch_add(volatile void* to, TYPE x, int) {                                    \
    return __atomic_fetch_add(static_cast<volatile TYPE*>(to), x, __ATOMIC_SEQ_CST);                                 \
  }                                                                                                                  \
  MK_HOOK(TYPE) __tsan_atomic##BITS##_fetch_sub(volatile void* to, TYPE x, int) {                                    \
    return __atomic_fetch_sub(static_cast<volatile TYPE*>(to), x, __ATOMIC_SEQ_CST);                                 \
  }                                                                                                                  \
  MK_HOOK(bool) __tsan_atomic##BITS##_compare_exchange_strong(volatile void* to, void* expected, TYPE x, int, int) { \
    return __atomic_compare_exchange_n(static_cast<volatile TYPE*>(to), static_cast<TYPE*>(expected), x, false,      \
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                          \
  }                                                                                                                  \
  MK_HOOK(bool) __tsan_atomic##BITS##_compare_exchange_weak(volatile void* to, void* expected, TYPE x, int, int) {   \
    return __atomic_compare_exchange_n(static_cast<volatile TYPE*>(to), static_cast<TYPE*>(expected), x, false,      \
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                          \
  }
extern "C" {
MK_ACCESSES(1)
MK_ACCESSES(2)
MK_ACCESSES(4)
MK_ACCESSES(8)
MK_ACCESSES(16)
MK_HOOK(void) __tsan_read_range(void*, long) { cuda_on_cpu::access(); }
MK_HOOK(void) __tsan_write_range(void*, long) { cuda_on_cpu::access(); }
MK_ATOMICS(unsigned char, 8)
MK_ATOMICS(unsigned short, 16)
MK_ATOMICS(unsigned int, 32)
MK_ATOMICS(unsigned long, 64)
MK_HOOK(void) __tsan_init() {}
MK_HOOK(void) __tsan_func_entry(void*) {}
MK_HOOK(void) __tsan_func_exit(void*) {}
MK_HOOK(void) __tsan_vptr_read(void*) {}
MK_HOOK(void) __tsan_vptr_update(void*, void*) {}
}
#endif
