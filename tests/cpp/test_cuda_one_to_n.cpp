// csrc/cuda/one_to_n.cuh, run without a GPU, against the op on the CPU.
#include "cuda/one_to_n.cuh"
#include "device_tensors.h"
#include "ops.h"

namespace {

using at::Tensor;
namespace mk = margin_kernels;
using mk::cuda::acc_t;
using mk::cuda::LogSum;
using mk::cuda::OneToN;

template <class T>
constexpr at::ScalarType type_of = c10::CppTypeToScalarType<T>::value;

struct Results {
  Tensor loss, column, normalizer, slope;
};

template <class T>
Results on_device(const Tensor& logits, const Tensor& target, const Tensor& grad, double delta, bool positive,
                  bool cross_entropy) {
  using acc = acc_t<T>;
  constexpr auto wide = type_of<acc>;
  const int64_t n = logits.size(0), classes = logits.size(1);
  const OneToN<T> in{logits.data_ptr<T>(),       logits.stride(0),       n, classes,
                     target.data_ptr<int64_t>(), static_cast<acc>(delta)};
  Results r{unwritten({n}, wide), unwritten({classes}, wide), unwritten({cross_entropy ? n : 0}, wide),
            misaligned(unwritten({n, classes}, type_of<T>))};
  const Tensor partials = unwritten({mk::cuda::forward_tiles<T>(n, classes).chunks, classes, 2}, wide);
  const Tensor samples = unwritten({n, 4}, wide), totals = unwritten({classes, 2}, wide);
  const Tensor segments = unwritten({mk::cuda::one_to_n_segments(n), classes}, at::kDouble);
  acc* rows = cross_entropy ? r.normalizer.data_ptr<acc>() : nullptr;
  const cuda_on_cpu::Launch launch;
  mk::cuda::one_to_n_forward(launch, in, positive, reinterpret_cast<LogSum<acc>*>(partials.data_ptr<acc>()),
                             r.loss.data_ptr<acc>(), r.column.data_ptr<acc>(), rows);
  mk::cuda::one_to_n_backward(launch, in, positive, grad.data_ptr<acc>(),
                              static_cast<const acc*>(r.column.data_ptr<acc>()), static_cast<const acc*>(rows),
                              static_cast<mk::cuda::SampleSlope<acc>*>(samples.data_ptr()), segments.data_ptr<double>(),
                              reinterpret_cast<LogSum<acc>*>(totals.data_ptr<acc>()), r.slope.data_ptr<T>());
  return r;
}

template <class T>
void agrees_with_the_cpu(int64_t n, int64_t classes, const char* what = "", bool every_schedule = true) {
  const std::string kind = what;
  const double tolerance = type_of<T> == at::kDouble ? 1e-12 : 4e-6;
  const double slope_tolerance = type_of<T> == at::kDouble ? 1e-12 : type_of<T> == at::kFloat ? 1e-5 : 1e-2;
  Tensor logits = misaligned((at::randn({n, classes}) * (kind == "large" ? 60 : 1.5)).to(type_of<T>));
  Tensor target = at::randint(classes, {n}, at::kLong);
  if (kind == "one class") target.fill_(classes - 1);
  if (kind == "bounds" && n > 2) {
    logits[0].fill_(1.0);  // at both kinks for delta = 1
    logits[1].fill_(-1.0);
  }
  if (kind == "not finite" && n > 3) {
    logits[0][0] = nan_value;
    logits[1][1] = inf;
    logits[2][0] = -inf;
  }
  const Tensor grad = at::randn({n}, type_of<acc_t<T>>);
  for (const bool positive : {false, true}) {
    for (const bool cross_entropy : {false, true}) {
      const std::string bound = positive ? "positive" : "symmetric";
      const std::string where = kind + " " + bound + (cross_entropy ? " with cross-entropy, " : ", ") +
                                std::to_string(n) + " x " + std::to_string(classes);
      const auto [loss, column, normalizer] = mk::one_to_n(logits, target, 1.0, bound, cross_entropy);
      const Tensor slope = mk::one_to_n_backward(grad, logits, target, column, normalizer, 1.0, bound, cross_entropy);
      const auto check = [&] {
        const Results r = on_device<T>(logits, target, grad, 1.0, positive, cross_entropy);
        expect_close(r.column, column, tolerance, "column " + where, 1);
        expect_close(r.normalizer, normalizer, tolerance, "normalizer " + where, 1);
        expect_close(r.loss, loss, tolerance, "loss " + where, 1);
        expect_close(r.slope, slope, slope_tolerance, "slope " + where, 0.1);
      };
      if (every_schedule) {
        cuda_on_cpu::under_every_schedule(check);
      } else {
        check();
      }
    }
  }
}

void an_invalid_target_makes_every_loss_nan() {
  const Tensor logits = at::randn({4, 6}), target = at::tensor({int64_t{0}, int64_t{6}, int64_t{-1}, int64_t{2}});
  const Results r = on_device<float>(logits, target, at::ones({4}), 1.0, false, false);
  EXPECT(r.loss.isnan().all().item<bool>());
  EXPECT(r.slope[1].isnan().all().item<bool>() && r.slope[2].isnan().all().item<bool>());
}

}  // namespace

int main() {
  at::manual_seed(0);
  for (const char* what : {"", "bounds", "not finite", "one class", "large"}) {
    agrees_with_the_cpu<float>(7, 5, what);
    agrees_with_the_cpu<double>(70, 67, what);
  }
  agrees_with_the_cpu<c10::BFloat16>(37, 301);
  agrees_with_the_cpu<c10::Half>(9, 130);
  agrees_with_the_cpu<float>(1, 2);
  agrees_with_the_cpu<float>(4200, 3, "", false);  // several chunks of rows and segments of samples
  agrees_with_the_cpu<float>(5, 8200, "", false);  // a block for each row, many tiles of columns
  agrees_with_the_cpu<c10::BFloat16>(70, 264);     // eight rows of a thread at once
  agrees_with_the_cpu<float>(0, 4);
  an_invalid_target_makes_every_loss_nan();
  return report("cuda_one_to_n");
}
