// csrc/cuda/row_distance.cuh, run without a GPU, against the op on the CPU.
#include "cuda/row_distance.cuh"
#include "device_tensors.h"
#include "ops.h"

namespace {

using at::Tensor;
namespace mk = margin_kernels;
using mk::cuda::acc_t;
using mk::cuda::RowPairs;

const double kPs[] = {1, 1.5, 2, 3, 4, inf};

template <class T>
struct Device {
  const Tensor &rows, &index, &target;

  RowPairs<T> pairs() const {
    return {rows.data_ptr<T>(),         rows.stride(0), rows.size(0), rows.size(1), index.data_ptr<int64_t>(),
            target.data_ptr<int64_t>(), target.size(0), index.size(1)};
  }
  Tensor norms(double p) const {
    Tensor result = unwritten(index.sizes(), c10::CppTypeToScalarType<acc_t<T>>::value);
    mk::cuda::row_distance_forward<T>(cuda_on_cpu::Launch(), pairs(), p, result.data_ptr<acc_t<T>>());
    return result;
  }
  Tensor slope(double p, const Tensor& grad, const Tensor& norms) const {
    const auto [sorted, order] =
        at::sort(at::cat({index.reshape({-1}), target.repeat_interleave(index.size(1))}), true, 0, false);
    Tensor ties = at::full({index.numel()}, -7, at::kLong), result = at::zeros(rows.sizes(), rows.options());
    const Tensor sums = unwritten({mk::cuda::use_segments(index.numel()), 2, rows.size(1)}, norms.scalar_type());
    const mk::cuda::RowUses<T> uses{sorted.template data_ptr<int64_t>(), order.template data_ptr<int64_t>(),
                                    sorted.numel(), sums.data_ptr<acc_t<T>>(), result.data_ptr<T>()};
    mk::cuda::row_distance_backward<T>(cuda_on_cpu::Launch(), pairs(), p, uses, norms.data_ptr<acc_t<T>>(),
                                       grad.data_ptr<acc_t<T>>(), ties.data_ptr<int64_t>());
    return result;
  }
};

template <class T>
void agrees_with_the_cpu(int64_t classes, int64_t length, int64_t n, int64_t k, bool shift, double factor = 1) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value, acc = c10::CppTypeToScalarType<acc_t<T>>::value;
  const double tolerance = type == at::kDouble ? 1e-12 : type == at::kFloat ? 3e-6 : 8e-3;
  Tensor rows = (at::randn({classes, length}) * factor).to(type);
  if (shift) rows = misaligned(rows);
  if (length > 4) {
    rows[1] = rows[0];  // norm 0
    rows[2][3] = 0;     // ties: differences of equal size
    rows[2].fill_(factor);
    rows[0].fill_(0);
  }
  const Tensor index = at::randint(classes, {n, k}, at::kLong), target = at::randint(classes, {n}, at::kLong);
  if (n > 1) {
    index[0][0] = target[0];
    index[1][0] = 2;
    target[1] = 0;
  }
  const Tensor grad = at::randn({n, k}, acc);
  const Device<T> device{rows, index, target};
  for (const double p : kPs) {
    const std::string where = "p=" + std::to_string(p) + " D=" + std::to_string(length);
    const Tensor norms = mk::row_distance(rows, index, target, p);
    const Tensor slope = mk::row_distance_backward(grad, rows, index, target, norms, p);
    cuda_on_cpu::under_every_schedule([&] {
      expect_close(device.norms(p), norms, type == at::kDouble ? 1e-12 : 3e-6, "norm " + where);
      expect_close(device.slope(p, grad, norms), slope, tolerance, "slope " + where, 1);
    });
  }
}

void an_invalid_class_is_nan_for_its_pair_alone() {
  const Tensor rows = at::randn({5, 7}), target = at::tensor({int64_t{0}, int64_t{1}, int64_t{9}});
  const Tensor index =
      at::tensor({int64_t{1}, int64_t{2}, int64_t{-1}, int64_t{3}, int64_t{0}, int64_t{1}}).view({3, 2});
  const Device<float> device{rows, index, target};
  const Tensor norms = device.norms(2);
  const Tensor expected =
      at::tensor({(rows[1] - rows[0]).norm().item<double>(), (rows[2] - rows[0]).norm().item<double>(), nan_value,
                  (rows[3] - rows[1]).norm().item<double>(), nan_value, nan_value})
          .view({3, 2});
  expect_close(norms, expected, 1e-6, "norm beside invalid classes");
  const Tensor slope = device.slope(2, at::ones({3, 2}), norms);
  const auto unit = [&](int64_t i, int64_t j) { return (rows[i] - rows[j]) / (rows[i] - rows[j]).norm(); };
  const Tensor truth =
      at::stack({-unit(1, 0) - unit(2, 0), unit(1, 0) - unit(3, 1), unit(2, 0), unit(3, 1), at::zeros({7})});
  expect_close(slope, truth, 1e-5, "slope beside invalid classes", 1);
}

}  // namespace

int main() {
  at::manual_seed(0);
  for (const bool shift : {false, true}) {
    agrees_with_the_cpu<float>(6, 37, 7, 3, shift);
    agrees_with_the_cpu<double>(6, 300, 3, 2, shift);
    agrees_with_the_cpu<c10::BFloat16>(6, 133, 4, 2, shift);
    agrees_with_the_cpu<c10::Half>(6, 4501, 2, 2, shift);  // a block per pair
  }
  agrees_with_the_cpu<float>(4, 2100, 3, 1, false);  // a block per pair
  agrees_with_the_cpu<float>(4, 40, 3, 2, false, 1e20);
  agrees_with_the_cpu<float>(4, 40, 3, 2, false, 1e-23);
  agrees_with_the_cpu<float>(3, 1, 2, 2, false);
  agrees_with_the_cpu<float>(4, 6, 60, 3, false);  // classes over several segments of uses
  agrees_with_the_cpu<c10::BFloat16>(3, 1100, 40, 1, false);
  agrees_with_the_cpu<float>(3, 5, 0, 2, false);
  an_invalid_class_is_nan_for_its_pair_alone();
  return report("cuda_row_distance");
}
