// The stand-in for a device: blocks, barriers, shuffles and votes do what they do on one, and mistakes are reported.
#include "check.h"
#include "cuda/device.cuh"
#include "cuda_on_cpu.h"

namespace mistakes {

// These mistakes leave no trace where every thread runs to the next barrier, and a block finds what the one
// before left. With a name outside this file, as the kernels of csrc/cuda: the compiler may keep a variable of this file
// alone in a register.
__global__ void lost_updates(int* out) {  // a sum without atomicAdd
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  count = count + 1;
  __syncthreads();
  if (threadIdx.x == 0) *out = count;
}
__global__ void atomic_updates(int* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  __syncthreads();
  if (threadIdx.x == 0) *out = count;
}
template <class T>
__global__ void stale(const T* in, T* out) {  // block 1 writes nothing: a condition that is wrong for it
  __shared__ T held[32];
  if (blockIdx.x == 0) held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[32 * blockIdx.x + threadIdx.x] = held[31 - threadIdx.x];
}

}  // namespace mistakes

namespace {

using margin_kernels::cuda::sum_lanes;

// Two stages: partial[b] = sum of the elements of block b, then one block adds the partial sums. in: [n], out: [1].
__global__ void block_sums(const float* in, int64_t n, float* partial) {
  MK_DYNAMIC_SHARED(float, warps);
  float sum = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) sum += in[i];
  sum = sum_lanes(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = sum_lanes(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  }
}

void a_sum_in_two_stages() {
  std::vector<float> in(1000), partial(5, NAN), out(1, NAN);
  std::iota(in.begin(), in.end(), 1.0f);
  cuda_on_cpu::under_every_schedule([&] {
    const cuda_on_cpu::Launch launch;
    launch(block_sums, 5, 96, 3 * sizeof(float), in.data(), 1000, partial.data());
    launch(block_sums, 1, 64, 2 * sizeof(float), partial.data(), 5, out.data());
    EXPECT(out[0] == 500500);
  });
}

__global__ void warp_calls(int* out) {  // out: [64, 8]
  const int t = threadIdx.x, lane = t % 32;
  int* mine = out + 8 * t;
  mine[0] = __shfl_sync(0xffffffffu, t, 3);
  mine[1] = __shfl_xor_sync(0xffffffffu, t, 1);
  mine[2] = __shfl_down_sync(0xffffffffu, t, 2, 8);
  mine[3] = __shfl_up_sync(0xffffffffu, t, 1);
  mine[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane < 4));
  mine[5] = lane < 16 ? __any_sync(0xffffu, lane == 15) : __any_sync(0xffff0000u, lane == 15);
  mine[6] = static_cast<int>(__shfl_sync(0xffffffffu, 1e10 + t, lane ^ 2) - 1e10);
  mine[7] = __syncthreads_count(t % 3 == 0);
}

void lanes_talk() {
  std::vector<int> out(64 * 8);
  cuda_on_cpu::under_every_schedule([&] {
    cuda_on_cpu::Launch()(warp_calls, 1, 64, 0, out.data());
    for (int t = 0; t < 64; ++t) {
      const int* mine = out.data() + 8 * t;
      EXPECT(mine[0] == t / 32 * 32 + 3 && mine[1] == (t ^ 1) && mine[2] == (t % 8 < 6 ? t + 2 : t));
      EXPECT(mine[3] == (t % 32 == 0 ? t : t - 1) && mine[4] == 15 && mine[5] == (t % 32 < 16));
      EXPECT(mine[6] == (t ^ 2) && mine[7] == 22);
    }
  });
}

template <class... Parameters, class... Arguments>
std::string error_of(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) {
  try {
    cuda_on_cpu::Launch()(kernel, grid, block, 0, arguments...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barrier_against_warp() {
  if (threadIdx.x < 31) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void outside_the_mask() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}
__global__ void misaligned(const float* in) { __ldg(reinterpret_cast<const uint4*>(in + 1)); }
__global__ void nothing() {}

void mistakes_are_reported() {
  EXPECT(
      error_of(half_a_barrier, 1, 64).starts_with("deadlock in block 0: 32 threads have returned, 0 wait for their"));
  EXPECT(error_of(two_barriers, 1, 64).starts_with("threads wait at different barriers"));
  EXPECT(error_of(barrier_against_warp, 1, 32).starts_with("deadlock in block 0: 0 threads have returned, 1 wait"));
  EXPECT(error_of(outside_the_mask, 1, 32).starts_with("a shuffle reads a lane outside its mask"));
  alignas(16) const float in[8] = {};
  EXPECT(error_of(misaligned, 1, 32, in).starts_with("misaligned load"));
  EXPECT(error_of(nothing, 0, 32) == "the grid is empty or too large");
  EXPECT(error_of(nothing, 1, 1025) == "a block has 1 to 1024 threads");
  EXPECT(error_of(nothing, 3, 1024).empty());
}

void mistakes_between_barriers_are_found() {
  int count = 0;
  const auto run = [&](auto kernel) {
    cuda_on_cpu::Launch()(kernel, 1, 256, 0, &count);
    return count;
  };
  cuda_on_cpu::under_every_schedule([&] { EXPECT(run(mistakes::atomic_updates) == 256); });
  EXPECT(run(mistakes::lost_updates) == 256);  // not seen
#if defined(__SANITIZE_THREAD__)
  cuda_on_cpu::schedule() = cuda_on_cpu::Schedule::SWITCHING;
  const int first = run(mistakes::lost_updates);
  EXPECT(first < 256 && run(mistakes::lost_updates) == first);  // found, and alike in every run
  cuda_on_cpu::schedule() = cuda_on_cpu::Schedule::ASCENDING;
#endif
}

void no_block_sees_the_shared_memory_of_another() {
  std::vector<float> in(32, 1.0f), out(64);
  cuda_on_cpu::Launch()(mistakes::stale<float>, 2, 32, 0, in.data(), out.data());
  EXPECT(std::count(out.begin(), out.end(), 1.0f) == 32 && std::isnan(out[32]) && std::isnan(out[63]));
  std::vector<int> places(32, 7), found(64);
  cuda_on_cpu::Launch()(mistakes::stale<int>, 2, 32, 0, places.data(), found.data());
  EXPECT(std::count(found.begin(), found.end(), 7) == 32 && std::count(found.begin(), found.end(), -1) == 32);
}

}  // namespace

int main() {
  a_sum_in_two_stages();
  lanes_talk();
  mistakes_are_reported();
  mistakes_between_barriers_are_found();
  no_block_sees_the_shared_memory_of_another();
  return report("cuda_on_cpu");
}
