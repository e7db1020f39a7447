// csrc/cuda/margin_hinge.cuh, run without a GPU, against the op on the CPU.
#include "cuda/margin_hinge.cuh"
#include "device_tensors.h"
#include "ops.h"

namespace {

using at::Tensor;
namespace mk = margin_kernels;
using mk::cuda::MarginHinge;
using mk::math::Aggregation;

const char* const kNames[] = {"max", "sum", "mean", "mean_distance"};

template <class T>
void agrees_with_the_cpu(int64_t n, int64_t k, int64_t layers, bool optional) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  const double tolerance = type == at::kDouble ? 1e-13 : 2e-6;
  Tensor gap = at::randn({n, k}, type), norm = at::rand({n, k, layers}, type) + 0.1;
  const Tensor gamma = at::rand({layers}, type) + 0.5, grad = at::randn({n}, type);
  if (n > 3) {
    gap[1][k - 1] = nan_value;
    norm[2][0][0] = 0;
    norm[3][k / 2][layers - 1] = inf;
    gap[3].fill_(gap[3][0]);  // ties
    norm[3].fill_(1);
  }
  if (n > 8) {
    gap[4][0] = -inf;
    gap[5].fill_(-inf);
    gap[6][k - 1] = inf;
    gap[7][0] = -inf;
    norm[7][0][0] = inf;
    norm[8][k / 2].fill_(inf);
  }
  std::optional<Tensor> cap, weight, min_norm;
  if (optional) {
    cap = at::rand({layers}, type) + 0.2;
    weight = at::rand({layers}, type);
    (*weight)[0] = 0;
    min_norm = at::rand({layers}, type) * 0.8;
  }
  for (int a = 0; a < 4; ++a) {
    for (const char* reduction : {"mean", "sum"}) {
      const double eps = a == 2 ? 0 : 1e-6;
      const std::string where = std::string(kNames[a]) + " " + reduction + " k=" + std::to_string(k);
      const MarginHinge<T> in{gap.data_ptr<T>(),
                              norm.data_ptr<T>(),
                              gamma.data_ptr<T>(),
                              cap ? cap->data_ptr<T>() : nullptr,
                              weight ? weight->data_ptr<T>() : nullptr,
                              min_norm ? min_norm->data_ptr<T>() : nullptr,
                              n,
                              static_cast<int>(k),
                              static_cast<int>(layers),
                              static_cast<T>(eps),
                              static_cast<Aggregation>(a),
                              std::string(reduction) == "mean"};
      const auto [loss, distance] =
          mk::margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, kNames[a], reduction);
      const auto [dgap, dnorm] =
          mk::margin_hinge_backward(grad, gap, norm, gamma, cap, weight, min_norm, eps, kNames[a], reduction, true);
      cuda_on_cpu::under_every_schedule([&] {
        const cuda_on_cpu::Launch launch;
        Tensor loss_ = unwritten({n}, type), distance_ = unwritten({n, k, layers}, type);
        mk::cuda::margin_hinge_forward(launch, in, loss_.data_ptr<T>(), distance_.data_ptr<T>());
        expect_close(distance_, distance, tolerance, "distance " + where, 1);
        expect_close(loss_, loss, tolerance, "loss " + where, 1);
        Tensor dgap_ = unwritten({n, k}, type), dnorm_ = unwritten({n, k, layers}, type);
        mk::cuda::margin_hinge_backward(launch, in, grad.data_ptr<T>(), dgap_.data_ptr<T>(), dnorm_.data_ptr<T>());
        expect_close(dgap_, dgap, tolerance, "dgap " + where, 1);
        expect_close(dnorm_, dnorm, tolerance, "dnorm " + where, 1);
        dgap_.fill_(nan_value);
        mk::cuda::margin_hinge_backward(launch, in, grad.data_ptr<T>(), dgap_.data_ptr<T>(), static_cast<T*>(nullptr));
        expect_close(dgap_, dgap, tolerance, "dgap alone " + where, 1);
      });
    }
  }
}

}  // namespace

int main() {
  at::manual_seed(0);
  for (const bool optional : {false, true}) {
    for (const int64_t k : {1, 3, 9, 40, 133}) {  // 1, 1, 4, 16 and 32 lanes per sample
      agrees_with_the_cpu<float>(37, k, 3, optional);
      agrees_with_the_cpu<double>(5, k, 1, optional);
    }
    agrees_with_the_cpu<float>(300, 2, 2, optional);
    agrees_with_the_cpu<float>(1, 5, 2, optional);
    agrees_with_the_cpu<double>(0, 3, 1, optional);
  }
  return report("cuda_margin_hinge");
}
