// csrc/cuda/competitors.cuh, run without a GPU, against the op on the CPU.
#include "cuda/competitors.cuh"
#include "device_tensors.h"
#include "ops.h"

namespace {

using at::Tensor;
namespace mk = margin_kernels;
using mk::cuda::acc_t;

template <class T>
constexpr at::ScalarType type_of = c10::CppTypeToScalarType<T>::value;

constexpr int64_t ignored = -100;

struct Outputs {
  Tensor index, gap, nll, phi, uniform, normalizer;
};

// The gradients of the four outputs; undefined where nothing depends on one.
struct Grads {
  std::optional<Tensor> gap, nll, phi, uniform;
};

template <class T>
Outputs forward(const Tensor& logits, const Tensor& target, int64_t k, bool uniform = true) {
  using acc = acc_t<T>;
  const int64_t n = logits.size(0);
  const auto type = type_of<acc>;
  Outputs o{at::full({n, k}, -7, at::kLong),    unwritten({n, k}, type), unwritten({n}, type), unwritten({n}, type),
            unwritten({uniform ? n : 0}, type), unwritten({n, 3}, type)};
  const auto [lists, sums] = mk::cuda::competitors_workspace<T>(n, logits.size(1), k);
  Tensor values = unwritten({lists}, type), indices = at::full({lists}, -7, at::kInt);
  Tensor totals = unwritten({4 * sums}, type);
  const mk::cuda::CompetitorsIn<T> in{logits.data_ptr<T>(),
                                      logits.stride(0),
                                      target.data_ptr<int64_t>(),
                                      target.stride(0),
                                      ignored,
                                      n,
                                      static_cast<int>(logits.size(1)),
                                      static_cast<int>(k),
                                      o.index.data_ptr<int64_t>(),
                                      o.gap.data_ptr<acc>(),
                                      o.nll.data_ptr<acc>(),
                                      o.phi.data_ptr<acc>(),
                                      uniform ? o.uniform.data_ptr<acc>() : nullptr,
                                      o.normalizer.data_ptr<acc>()};
  mk::cuda::competitors_forward(
      cuda_on_cpu::Launch(), in,
      {values.data_ptr<acc>(), indices.data_ptr<int>(), static_cast<mk::cuda::SumExp<acc>*>(totals.data_ptr())});
  return o;
}

template <class T>
Tensor backward(const Grads& grads, const Tensor& logits, const Tensor& target, const Tensor& index,
                const Tensor& normalizer) {
  using acc = acc_t<T>;
  Tensor dlogits = unwritten(logits.sizes(), type_of<T>);
  mk::cuda::CompetitorsBackwardIn<T> in{};
  in.logits = logits.data_ptr<T>();
  in.row_stride = logits.stride(0);
  in.target = target.data_ptr<int64_t>();
  in.target_stride = target.stride(0);
  in.rows = logits.size(0);
  in.classes = static_cast<int>(logits.size(1));
  in.k = static_cast<int>(index.size(1));
  in.index = index.data_ptr<int64_t>();
  in.normalizer = normalizer.data_ptr<acc>();
  if (grads.gap) {
    in.grad_gap = grads.gap->data_ptr<acc>();
    in.gap_strides[0] = grads.gap->stride(0);
    in.gap_strides[1] = grads.gap->stride(1);
  }
  const auto per_sample = [](const std::optional<Tensor>& t) {
    return t ? mk::cuda::PerSample<acc>{t->data_ptr<acc>(), t->stride(0)} : mk::cuda::PerSample<acc>{nullptr, 0};
  };
  in.grad_nll = per_sample(grads.nll);
  in.grad_phi = per_sample(grads.phi);
  in.grad_uniform = per_sample(grads.uniform);
  in.dlogits = dlogits.data_ptr<T>();
  mk::cuda::competitors_backward(cuda_on_cpu::Launch(), in);
  return dlogits;
}

// Everything against the CPU op, under every order of threads; what comes out is the same in each.
template <class T>
void agrees_with_the_cpu(const Tensor& logits, const Tensor& target, int64_t k, const std::string& what) {
  const std::string where =
      what + " " + c10::toString(type_of<T>) + " C=" + std::to_string(logits.size(1)) + " k=" + std::to_string(k);
  const auto type = type_of<acc_t<T>>;
  const double tolerance = type == at::kDouble ? 1e-12 : 1e-6;
  const double rounding = type_of<T> == at::kDouble  ? 1e-12
                          : type_of<T> == at::kFloat ? 4e-6
                          : type_of<T> == at::kHalf  ? 2e-3
                                                     : 1e-2;
  // Entries of label and competitors are sums of gradients of order 1; those of nll alone must be right when small too.
  const double sums = type_of<T> == at::kDouble || type_of<T> == at::kFloat ? 1 : 1e-3;
  const auto [gap, nll, phi, uniform, index, normalizer, valid] = mk::competitors(logits, target, k, ignored, true);
  const auto on_cpu = [&, index = index, normalizer = normalizer](const Grads& g) {
    return mk::competitors_backward(g.gap, g.nll, g.phi, g.uniform, logits, target, index, normalizer);
  };
  // Strided in both dimensions, and broadcast.
  const int64_t n = logits.size(0);
  const Tensor grad_gap = at::randn({k, n}, type).t(), grad_nll = at::randn({1}, type).expand({n});
  const Grads every{grad_gap, grad_nll, at::randn({n}, type), at::randn({2 * n}, type).slice(0, 0, 2 * n, 2)};
  Outputs first;
  Tensor first_slope;
  cuda_on_cpu::under_every_schedule(
      [&, index = index, gap = gap, nll = nll, phi = phi, uniform = uniform, normalizer = normalizer] {
        const Outputs o = forward<T>(logits, target, k);
        const Tensor slope = backward<T>(every, logits, target, index, normalizer);
        if (first.gap.defined()) {
          expect_same_bits(o.nll, first.nll, "repeated nll " + where);
          expect_same_bits(o.phi, first.phi, "repeated phi " + where);
          expect_same_bits(o.uniform, first.uniform, "repeated uniform " + where);
          expect_same_bits(slope, first_slope, "repeated gradient " + where);
          EXPECT(at::equal(o.index, first.index));
          return;
        }
        first = o;
        first_slope = slope;
        if (!at::equal(o.index, index)) std::printf("index %s\n", where.c_str());
        EXPECT(at::equal(o.index, index));
        expect_same_bits(o.gap, gap, "gap " + where);
        expect_close(o.nll, nll, tolerance, "nll " + where, 1);
        expect_close(o.phi, phi, tolerance, "phi " + where, 1);
        expect_close(o.uniform, uniform, tolerance, "uniform " + where, 1);
        expect_close(o.normalizer, normalizer, tolerance, "normalizer " + where, 1);
        expect_close(slope, on_cpu(every), rounding, "gradient " + where, sums);
      });
  const Outputs without = forward<T>(logits, target, k, false);
  expect_same_bits(without.nll, first.nll, "nll without uniform " + where);
  expect_same_bits(without.phi, first.phi, "phi without uniform " + where);
  const std::pair<const char*, Grads> alone[] = {{"gap", {grad_gap, {}, {}, {}}},
                                                 {"nll", {{}, grad_nll, {}, {}}},
                                                 {"phi", {{}, {}, grad_nll, {}}},
                                                 {"uniform", {{}, {}, {}, grad_nll}}};
  for (const auto& [name, grads] : alone) {
    // An entry of `uniform` is g (p - 1 / C): the roundings of p and 1 / C stay where the difference is small, so that
    // the entry is judged by 1 / C.
    const double scale = grads.gap ? sums : grads.uniform ? 1e-3 + 1.0 / static_cast<double>(logits.size(1)) : 1e-3;
    expect_close(backward<T>(grads, logits, target, index, normalizer), on_cpu(grads), rounding,
                 std::string("gradient of ") + name + " " + where, scale);
  }
}

template <class T>
Tensor random(int64_t n, int64_t classes) {
  return (3 * at::randn({n, classes}, type_of<acc_t<T>>)).to(type_of<T>);
}

Tensor random_target(int64_t n, int64_t classes) { return at::randint(classes, {n}, at::kLong); }

template <class T>
void every_path() {
  // 1 to 32 lanes of a warp, a block, several blocks per row; N that fills no block, and rows that begin anywhere.
  std::vector<int64_t> sizes{3, 10, 100, 129, 300, 1000, 2048, 2049, 40001};
  if (type_of<T> == at::kFloat) {
    sizes = {2, 3, 10, 16, 17, 33, 64, 65, 100, 128, 129, 256, 257, 513, 1000, 1025, 2048, 2049, 5003, 40001};
  }
  for (const int64_t classes : sizes) {
    for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{32}, int64_t{70}, classes - 1}) {
      if (k >= classes || k > 130 || (k == 70 && classes > 3000) || (k > 3 && classes < 128 && k != classes - 1))
        continue;
      if (k > 3 && classes > 3000 && type_of<T> != at::kFloat) continue;
      const int64_t n = classes < 200 ? (k < 10 ? 71 : 9) : classes < 3000 ? 9 : 2;
      agrees_with_the_cpu<T>(random<T>(n, classes), random_target(n, classes), k, "random");
    }
  }
  agrees_with_the_cpu<T>(misaligned(random<T>(11, 1000)), random_target(11, 1000), 5, "misaligned");
  agrees_with_the_cpu<T>(random<T>(7, 1500).slice(1, 3, 1401), random_target(14, 1398).slice(0, 0, 14, 2), 2,
                         "strided");
  agrees_with_the_cpu<T>(random<T>(1, 300).expand({5, 300}), random_target(5, 300), 2, "expanded");
  agrees_with_the_cpu<T>(misaligned(random<T>(3, 4099)), random_target(3, 4099), 40, "misaligned");
  agrees_with_the_cpu<T>(random<T>(1, 200), random_target(1, 200), 199, "every class");
  agrees_with_the_cpu<T>(random<T>(0, 50), random_target(0, 50), 3, "N = 0");
}

// Equal logits go to the lowest class, in whatever order threads meet them; -0 equals 0.
template <class T>
void ties() {
  for (const int64_t classes : {7, 300, 2500, 33000}) {
    Tensor logits = random<T>(4, classes).mul(0.4).round();
    logits[0].zero_();
    logits[1].zero_().slice(0, 0, classes, 2).mul_(-1);
    logits[2].copy_(at::arange(classes, type_of<acc_t<T>>).div(-16).floor().clamp(-50, 0));
    for (const int64_t k : {int64_t{1}, int64_t{5}, classes == 300 ? int64_t{45} : int64_t{6}}) {
      agrees_with_the_cpu<T>(logits, random_target(4, classes), k, "ties");
    }
  }
}

template <class T>
void extreme_values() {
  for (const int64_t classes : {5, 200, 700, 2600, 33000}) {
    Tensor logits = random<T>(10, classes);
    const double large = type_of<T> == at::kHalf ? 6e4 : type_of<T> == at::kDouble ? 1e300 : 1e30;
    logits[0][classes - 1] = nan_value;
    logits[1][classes / 2] = inf;
    logits[2][0] = -inf;
    logits[3].fill_(-inf);
    logits[4].fill_(-large);
    logits[5].fill_(large)[1] = -large;
    logits[6][classes - 1] = large;
    // max log2(e) is rounded: by what its product leaves over, and by more than an exponent may be off.
    logits[7].add_(1000);
    logits[8].add_(type_of<T> == at::kHalf ? 6e4 : 4e6);
    logits[9].sub_(type_of<T> == at::kHalf ? 6e4 : 3e9);
    const Tensor target = random_target(10, classes);
    target[0] = classes - 1;
    for (const int64_t k : {1, 4}) agrees_with_the_cpu<T>(logits, target, k, "extreme");
  }
}

// Masked classes: few, all but a few, all competitors, the label, the label and most competitors, everything; and
// ignored rows.
template <class T>
void masked_classes() {
  for (const int64_t classes : {2, 5, 129, 700, 2600, 33000}) {
    Tensor logits = random<T>(10, classes);
    const Tensor target = random_target(10, classes);
    logits[0][(target[0].item<int64_t>() + 1) % classes] = -inf;
    for (const int64_t row : {1, 2, 4, 5}) logits[row].fill_(-inf);
    logits[1][classes / 2] = 1;
    logits[1][classes - 1] = 2;
    logits[2][target[2].item<int64_t>()] = 3;
    logits[3][target[3].item<int64_t>()] = -inf;
    logits[4][(target[4].item<int64_t>() + 1) % classes] = 0.5;
    target[6] = ignored;
    target[7] = ignored;
    logits[7][0] = nan_value;
    logits[8].slice(0, 0, classes, 2) = -inf;
    if (classes > 2) logits[8][target[8].item<int64_t>()] = 20;
    logits[9][target[9].item<int64_t>()] = type_of<T> == at::kHalf ? 30 : 70;
    for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{4}, int64_t{40}}) {
      if (k < classes && !(k == 40 && classes > 3000 && type_of<T> != at::kFloat)) {
        agrees_with_the_cpu<T>(logits, target, k, "masked");
      }
    }
  }
}

// On a device a target outside [0, C) gives NaN in its row and leaves the other rows alone.
template <class T>
void invalid_targets() {
  for (const int64_t classes : {5, 300, 3000, 33000}) {
    const Tensor logits = random<T>(4, classes);
    const Tensor valid = random_target(4, classes);
    for (const int64_t k : {int64_t{2}, classes == 300 ? int64_t{35} : int64_t{1}}) {
      for (const int64_t wrong : {int64_t{-1}, classes, int64_t{1} << 40, -(int64_t{1} << 40)}) {
        const Tensor target = valid.clone();
        target[1] = wrong;
        const Outputs expected = forward<T>(logits, valid, k), o = forward<T>(logits, target, k);
        EXPECT(o.gap[1].isnan().all().template item<bool>() && o.nll[1].isnan().template item<bool>());
        EXPECT(o.phi[1].isnan().template item<bool>() && o.uniform[1].isnan().template item<bool>());
        EXPECT(o.normalizer[1].isnan().all().template item<bool>());
        EXPECT(at::equal(o.index[1], at::arange(1, k + 1)));
        const Tensor ones = at::ones({4, k}, o.gap.options()), one = at::ones({4}, o.gap.options());
        const Tensor slope = backward<T>({ones, one, one, one}, logits, target, o.index, o.normalizer);
        EXPECT(slope[1].isnan().all().template item<bool>());
        for (const int64_t n : {0, 2, 3}) {
          EXPECT(at::equal(o.gap[n], expected.gap[n]) && at::equal(o.nll[n], expected.nll[n]));
          EXPECT(slope[n].isfinite().all().template item<bool>());
        }
      }
    }
  }
}

// The sum of a row neither depends on its place in memory nor on the rows beside it.
template <class T>
void rows_are_independent() {
  for (const int64_t classes : {10, 777, 3001}) {
    const Tensor logits = random<T>(9, classes), target = random_target(9, classes);
    const Tensor alone = misaligned(logits.slice(0, 5, 6));
    const Outputs one = forward<T>(alone, target.slice(0, 5, 6), 2), all = forward<T>(logits, target, 2);
    expect_same_bits(one.nll[0], all.nll[5], "a row alone");
    expect_same_bits(one.phi[0], all.phi[5], "phi of a row alone");
    expect_same_bits(one.uniform[0], all.uniform[5], "uniform of a row alone");
    const Tensor g = at::ones({9}, one.nll.options());
    expect_same_bits(backward<T>({{}, g, g, g}, alone, target.slice(0, 5, 6), one.index, one.normalizer)[0],
                     backward<T>({{}, g, g, g}, logits, target, all.index, all.normalizer)[5],
                     "gradient of a row alone");
  }
}

template <class T>
void all() {
  every_path<T>();
  ties<T>();
  extreme_values<T>();
  masked_classes<T>();
  invalid_targets<T>();
  rows_are_independent<T>();
}

}  // namespace

int main() {
  at::manual_seed(0);
  all<float>();
  all<c10::BFloat16>();
#if !defined(__SANITIZE_ADDRESS__)  // minutes, for the same accesses
  all<double>();
  all<c10::Half>();
#endif
  return report("cuda_competitors");
}
