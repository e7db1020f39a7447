// What every launcher needs: the device of its tensors, the current stream, and tensors as pointers of device types.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "device.cuh"

namespace margin_kernels::cuda {

using at::Tensor;

// Makes the tensor's device current while it lives; `launch` is its current stream.
struct OnDevice {
  c10::cuda::CUDAGuard guard;
  Launch launch;
  explicit OnDevice(const Tensor& tensor)
      : guard(tensor.device()), launch{c10::cuda::getCurrentCUDAStream(tensor.device().index())} {}
};

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>()) with the device type of float64, float32, bfloat16 or float16.
template <class Body>
void with_type(at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kDouble:
      return body(Type<double>());
    case at::kFloat:
      return body(Type<float>());
    case at::kBFloat16:
      return body(Type<bfloat16>());
    case at::kHalf:
      return body(Type<half>());
    default:
      TORCH_CHECK_TYPE(false, "expected float64, float32, bfloat16 or float16, got ", type);
  }
}

}  // namespace margin_kernels::cuda
