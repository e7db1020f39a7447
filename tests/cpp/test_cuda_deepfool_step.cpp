// csrc/cuda/deepfool_step.cuh, run without a GPU, against the op on the CPU.
#include "cuda/deepfool_step.cuh"
#include "device_tensors.h"
#include "ops.h"

namespace {

using at::Tensor;
namespace mk = margin_kernels;
using mk::cuda::acc_t;
using mk::cuda::DeepFool;

const double kPs[] = {1, 1.5, 2, 3, 4, inf};

template <class T>
constexpr at::ScalarType type_of = c10::CppTypeToScalarType<T>::value;

template <class T>
void agrees_with_the_cpu(int64_t n, int64_t k, int64_t length, const char* what = "", bool every_schedule = true) {
  using acc = acc_t<T>;
  constexpr auto wide = type_of<acc>;
  const std::string kind = what;
  const double tolerance = type_of<T> == at::kDouble ? 1e-12 : type_of<T> == at::kFloat ? 4e-6 : 1e-2;
  const double scale = kind == "large" ? 1e18 : kind == "small" ? 1e-20 : 1;
  Tensor gap = -at::rand({n, k}, wide) - 0.1, w = misaligned((at::randn({n, k, length}) * scale).to(type_of<T>));
  std::optional<Tensor> active;
  if (kind == "special" && n > 5) {
    active = at::ones({n}, at::kBool);
    (*active)[0] = false;
    gap[0][0] = nan_value;  // not looked at
    gap[1][k - 1] = inf;
    w[2][0][length / 2] = nan_value;
    w[3][k - 1][0] = inf;
    w[4].fill_(0);
    w[5].fill_(1);  // equal distances, equal entries
    gap[5].fill_(-0.5);
  }
  const Tensor grad_step = at::randn({n, length}).to(type_of<T>), grad_distance = at::randn({n}, wide);
  for (const double p : kPs) {
    const std::string where = kind + " p=" + std::to_string(p) + " D=" + std::to_string(length);
    const auto [step, distance, choice, norm] = mk::deepfool_step(gap, w, active, p);
    const auto check = [&] {
      const cuda_on_cpu::Launch launch;
      const Tensor norms = mk::dual_norm({w}, p, 2);
      const DeepFool<T> in{gap.data_ptr<acc>(),
                           w.data_ptr<T>(),
                           w.stride(0),
                           w.stride(1),
                           active ? active->data_ptr<bool>() : nullptr,
                           norms.data_ptr<acc>(),
                           n,
                           k,
                           length};
      Tensor step_ = misaligned(unwritten({n, length}, type_of<T>)), distance_ = unwritten({n}, wide);
      Tensor choice_ = at::full({n}, -7, at::kLong), norm_ = unwritten({n}, wide);
      Tensor firsts = at::full({n * mk::cuda::step_parts(length)}, -7, at::kLong);
      mk::cuda::deepfool_step_forward<T>(launch, in, p, step_.data_ptr<T>(), distance_.data_ptr<acc>(),
                                         choice_.data_ptr<int64_t>(), norm_.data_ptr<acc>(),
                                         firsts.data_ptr<int64_t>());
      expect_same_bits(choice_, choice, "choice " + where);
      expect_close(distance_, distance, type_of<T> == at::kDouble ? 1e-12 : 4e-6, "distance " + where);
      expect_close(norm_, norm, type_of<T> == at::kDouble ? 1e-12 : 4e-6, "norm " + where);
      expect_close(step_, step, tolerance, "step " + where, 1e-3 / scale);
      for (const int given : {1, 2, 3}) {
        const auto step_grad = given & 1 ? std::optional<Tensor>(grad_step) : std::nullopt;
        const auto distance_grad = given & 2 ? std::optional<Tensor>(grad_distance) : std::nullopt;
        const auto [dgap, dw] = mk::deepfool_step_backward(step_grad, distance_grad, gap, w, choice, norm, active, p);
        const Tensor products = unwritten({n * mk::cuda::step_parts(length)}, at::kDouble);
        Tensor dgap_ = unwritten({n, k}, wide);
        firsts.fill_(-7);
        Tensor dw_ = misaligned(unwritten({n, k, length}, type_of<T>));
        mk::cuda::deepfool_step_backward<T>(
            launch, in, p, choice.template data_ptr<int64_t>(), norm.template data_ptr<acc>(),
            step_grad ? grad_step.data_ptr<T>() : nullptr, distance_grad ? grad_distance.data_ptr<acc>() : nullptr,
            products.data_ptr<double>(), firsts.data_ptr<int64_t>(), dgap_.data_ptr<acc>(), dw_.data_ptr<T>());
        expect_close(dgap_, dgap, tolerance, "dgap " + where, 1e-3 / scale);
        expect_close(dw_, dw, tolerance, "dw " + where, 1e-3 / scale / scale);
      }
    };
    if (every_schedule) {
      cuda_on_cpu::under_every_schedule(check);
    } else {
      check();
    }
  }
}

}  // namespace

int main() {
  at::manual_seed(0);
  agrees_with_the_cpu<float>(6, 3, 37, "special");
  agrees_with_the_cpu<double>(6, 2, 65, "special");
  agrees_with_the_cpu<c10::BFloat16>(3, 2, 133);
  agrees_with_the_cpu<c10::Half>(2, 3, 9);
  agrees_with_the_cpu<float>(3, 40, 5);  // more candidates than lanes
  agrees_with_the_cpu<float>(2, 2, 41, "large");
  agrees_with_the_cpu<float>(2, 2, 41, "small");
  agrees_with_the_cpu<float>(2, 1, 20000, "", false);  // several parts
  agrees_with_the_cpu<float>(1, 1, 1);
  agrees_with_the_cpu<float>(0, 2, 3);
  return report("cuda_deepfool_step");
}
