// csrc/cuda/dual_norm.cuh, run without a GPU, against the op on the CPU.
#include "cuda/dual_norm.cuh"
#include "device_tensors.h"
#include "ops.h"

namespace {

using at::Tensor;
namespace mk = margin_kernels;
using mk::cuda::acc_t;
using mk::cuda::NormLayer;
using mk::cuda::NormPlan;

const std::vector<double> kAll{1, 1.01, 1.5, 2, 3, 4, inf};  // q = inf, 101, 3, 2, 3/2, 4/3, 1
const std::vector<double> kOneEach{1, 1.5, 2, 3, inf};       // each kernel once

template <class T>
constexpr at::ScalarType type_of = c10::CppTypeToScalarType<T>::value;

// gradients: [N, k, length] each, with unit stride behind the batch.
template <class T>
struct Device {
  const std::vector<Tensor>& gradients;
  std::vector<Tensor> slopes;
  NormPlan plan;
  Tensor workspace;

  explicit Device(const std::vector<Tensor>& g)
      : gradients(g),
        slopes(outputs(g)),
        plan(layers(), g[0].size(0) * g[0].size(1), g[0].size(1), static_cast<int>(g.size()), sizeof(T)),
        workspace(unwritten({2 * plan.partials}, at::kDouble)) {}

  static std::vector<Tensor> outputs(const std::vector<Tensor>& g) {
    std::vector<Tensor> result;
    for (const Tensor& t : g) result.push_back(misaligned(unwritten(t.sizes(), type_of<T>)));
    return result;
  }

  std::vector<NormLayer> layers() const {
    std::vector<NormLayer> result;
    for (size_t l = 0; l < gradients.size(); ++l) {
      const Tensor &g = gradients[l], &s = slopes[l];
      result.push_back({g.data_ptr<T>(), s.data_ptr<T>(), g.stride(0), g.stride(1), s.stride(0), s.stride(1), g.size(2),
                        0, 0, 0, static_cast<int>(l)});
    }
    return result;
  }

  Tensor norms(double p) {
    const int64_t columns = gradients.size();
    Tensor result = unwritten({gradients[0].size(0), gradients[0].size(1), columns}, type_of<acc_t<T>>);
    mk::cuda::dual_norm_forward<T>(cuda_on_cpu::Launch(), plan, p, result.data_ptr<acc_t<T>>(),
                                   reinterpret_cast<mk::cuda::Partial*>(workspace.data_ptr<double>()));
    return result;
  }

  const std::vector<Tensor>& derivatives(double p, const Tensor& norms, const Tensor& grads) {
    mk::cuda::dual_norm_backward<T>(cuda_on_cpu::Launch(), plan, p, norms.data_ptr<acc_t<T>>(),
                                    grads.data_ptr<acc_t<T>>(), static_cast<int64_t*>(workspace.data_ptr()));
    return slopes;
  }
};

template <class T>
double rounding() {
  return type_of<T> == at::kDouble ? 1e-12 : type_of<T> == at::kFloat ? 2e-6 : type_of<T> == at::kHalf ? 2e-3 : 1e-2;
}

template <class T>
void agrees_with_the_cpu(const std::vector<Tensor>& gradients, const std::string& what,
                         const std::vector<double>& ps = kAll) {
  const double tolerance = type_of<T> == at::kDouble ? 1e-12 : 1e-6;
  const auto lead = gradients[0].sizes().slice(0, 2);
  const int64_t numel = gradients[0].numel();
  const Tensor grads = at::randn({lead[0], lead[1], static_cast<int64_t>(gradients.size())}, type_of<acc_t<T>>);
  for (const double p : ps) {
    // Neither backend computes these norms in float32: both launch the kernels for float64.
    if (mk::math::needs_float64(p) && type_of<T> != at::kDouble) continue;
    const std::string where = what + " p=" + std::to_string(p) + " " + c10::toString(type_of<T>);
    const Tensor expected = mk::dual_norm(gradients, p, 2);
    Tensor first;
    cuda_on_cpu::under_every_schedule([&] {
      Device<T> device(gradients);
      const Tensor norms = device.norms(p);
      if (!first.defined()) {
        first = norms;
        expect_close(norms, expected, tolerance, "norm " + where);
      }
      expect_same_bits(norms, first, "repeated norm " + where);
      if (numel > 20000 && cuda_on_cpu::schedule() != cuda_on_cpu::Schedule::SHUFFLED) return;
      const auto expected_slopes = mk::dual_norm_backward(grads, gradients, expected, p, 2);
      const auto& slopes = device.derivatives(p, expected, grads);
      for (size_t l = 0; l < gradients.size(); ++l) {
        expect_close(slopes[l], expected_slopes[l], rounding<T>(), "slope " + where + " layer " + std::to_string(l),
                     1e-30);
      }
    });
  }
}

template <class T>
Tensor random(int64_t n, int64_t k, int64_t length) {
  return at::randn({n, k, length}, type_of<acc_t<T>>).to(type_of<T>);
}

template <class T>
void every_length_and_layout() {
  for (const int64_t length : {1, 7, 16, 31, 1023}) {
    agrees_with_the_cpu<T>({random<T>(3, 3, length)}, "length " + std::to_string(length));
  }
  // A warp, a block and several blocks per row; rows that begin anywhere; rows with gaps between them.
  const int64_t part = 65536 / sizeof(T);
  agrees_with_the_cpu<T>({random<T>(2, 1, part + 1), random<T>(2, 1, 3), random<T>(2, 1, 5001)}, "three layers",
                         kOneEach);
  agrees_with_the_cpu<T>({misaligned(random<T>(1, 2, 2 * part)), misaligned(random<T>(1, 2, 777))}, "misaligned",
                         kOneEach);
  agrees_with_the_cpu<T>({random<T>(2, 4, 2100).slice(2, 3, 2090).slice(1, 0, 4, 2)}, "strided");
  agrees_with_the_cpu<T>({random<T>(1, 2, 50).expand({3, 2, 50})}, "expanded");
}

template <class T>
void special_values() {
  const auto acc = type_of<acc_t<T>>;
  for (const int64_t length : {int64_t{5}, int64_t{1500}, 65536 / int64_t{sizeof(T)} + 9}) {
    Tensor g = random<T>(1, 12, length);
    g[0][0].zero_();
    g[0][1].zero_()[length - 1] = 2;
    g[0][2].fill_(-3);  // ties
    g[0][3][length / 2] = nan_value;
    g[0][4][0] = inf;
    g[0][5][length - 1] = -inf;
    g[0][5][1] = nan_value;
    const double large = type_of<T> == at::kDouble ? 1e200 : 1e20, small = type_of<T> == at::kDouble ? 1e-200 : 1e-23;
    if (type_of<T> != at::kHalf) {
      g[0][6].copy_((at::randn({length}, acc) * large));
      g[0][7].copy_((at::randn({length}, acc) * small));
      g[0][8].fill_(small)[length - 1] = large;
      g[0][9].fill_(large);
      g[0][9].slice(0, 0, length, 2) *= -1;
    }
    g[0][10].slice(0, 1, length) = 0;
    g[0][11].slice(0, 0, length - 1) = 0;
    agrees_with_the_cpu<T>({g}, "special values, length " + std::to_string(length), length < 1000 ? kAll : kOneEach);
  }
}

// The sum of a row neither depends on its place in memory nor on the rows beside it.
template <class T>
void rows_are_independent() {
  for (const int64_t length : {77, 2500, 33333}) {
    const Tensor many = random<T>(3, 3, length);
    const std::vector<Tensor> all{many}, one{misaligned(many.slice(0, 2, 3).slice(1, 1, 2))};
    for (const double p : kOneEach) {
      expect_same_bits(Device<T>(one).norms(p)[0][0], Device<T>(all).norms(p)[2][1], "a row alone");
    }
  }
}

void more_layers_than_a_table_holds() {
  std::vector<Tensor> gradients;
  for (int64_t l = 0; l < 83; ++l) gradients.push_back(random<float>(2, 1, l % 7 == 3 ? 20000 : 10 * l + 1));
  EXPECT((Device<float>(gradients).plan.launches.size() == 3));
  agrees_with_the_cpu<float>(gradients, "83 layers", {1, 2});
}

void nothing_to_do() {
  agrees_with_the_cpu<float>({random<float>(0, 3, 5)}, "N = 0");
  agrees_with_the_cpu<float>({random<float>(2, 3, 0), random<float>(2, 3, 4)}, "length 0");
}

}  // namespace

int main() {
  at::manual_seed(0);
  every_length_and_layout<float>();
  every_length_and_layout<double>();
  every_length_and_layout<c10::BFloat16>();
  every_length_and_layout<c10::Half>();
  special_values<float>();
  special_values<double>();
  special_values<c10::BFloat16>();
  special_values<c10::Half>();
  rows_are_independent<float>();
  rows_are_independent<c10::BFloat16>();
  more_layers_than_a_table_holds();
  nothing_to_do();
  return report("cuda_dual_norm");
}
