// The ops from C++, without Python: values, derivatives to second order, and the words of an error.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <limits>
#include <string>

#include "check.h"
#include "ops.h"

using at::Tensor;
namespace mk = margin_kernels;

namespace {

Tensor gradient(const Tensor& output, const Tensor& input, bool create_graph = false) {
  return torch::autograd::grad({output}, {input}, {}, /*retain_graph=*/true, create_graph)[0];
}

void competitors_select_and_differentiate() {
  const Tensor logits = at::tensor({1.0, 4.0, 2.0, 3.0}, at::kDouble).reshape({1, 4}).requires_grad_();
  const Tensor target = at::tensor({int64_t{1}});
  const auto [gap, nll, phi, uniform, index, normalizer, valid] = mk::competitors(logits, target, 2, -100, false);
  EXPECT(index[0][0].item<int64_t>() == 3 && index[0][1].item<int64_t>() == 2);
  EXPECT_NEAR(gap[0][0].item<double>(), -1.0, 1e-15);
  EXPECT_NEAR(nll[0].item<double>(), std::log(std::exp(-3) + 1 + std::exp(-2) + std::exp(-1)), 1e-14);
  EXPECT_NEAR(phi[0].item<double>(), 4 - std::log(std::exp(1) + std::exp(2) + std::exp(3)), 1e-14);
  EXPECT(uniform.numel() == 0);
  const Tensor slope = gradient(nll.sum(), logits, true);
  EXPECT_NEAR(slope[0][1].item<double>(), at::softmax(logits, 1)[0][1].item<double>() - 1, 1e-13);
  // d/dz_1 of softmax_1 is softmax_1 (1 - softmax_1)
  const double s = at::softmax(logits, 1)[0][1].item<double>();
  EXPECT_NEAR(gradient(slope[0][1], logits)[0][1].item<double>(), s * (1 - s), 1e-12);
}

void norms_are_dual() {
  const Tensor g = at::tensor({3.0, -4.0}, at::kDouble).reshape({1, 2}).requires_grad_();
  EXPECT_NEAR(mk::dual_norm({g}, 2, 1).item<double>(), 5, 1e-15);
  EXPECT_NEAR(mk::dual_norm({g}, std::numeric_limits<double>::infinity(), 1).item<double>(), 7, 1e-15);
  EXPECT_NEAR(mk::dual_norm({g}, 1, 1).item<double>(), 4, 1e-15);
  const Tensor slope = gradient(mk::dual_norm({g}, 2, 1).sum(), g, true);
  EXPECT_NEAR(slope[0][0].item<double>(), 0.6, 1e-15);
  // d2 ||g|| / dg_0^2 = (1 - u_0^2) / ||g||
  EXPECT_NEAR(gradient(slope[0][0], g)[0][0].item<double>(), (1 - 0.36) / 5, 1e-13);
}

void a_hinge_on_the_distance() {
  const Tensor gap = at::tensor({-1.0}, at::kDouble).reshape({1, 1}).requires_grad_();
  const Tensor norm = at::full({1, 1, 1}, 2.0, at::kDouble), gamma = at::ones({1}, at::kDouble);
  const auto [loss, distance] = mk::margin_hinge(gap, norm, gamma, {}, {}, {}, 0, "max", "mean");
  EXPECT_NEAR(distance.item<double>(), 0.5, 1e-15);
  EXPECT_NEAR(loss.item<double>(), 0.5, 1e-15);
  EXPECT_NEAR(gradient(loss.sum(), gap).item<double>(), 0.5, 1e-15);
}

void rows_at_a_distance() {
  const Tensor rows = at::tensor({0.0, 0.0, 3.0, -4.0}, at::kDouble).reshape({2, 2}).requires_grad_();
  const Tensor index = at::tensor({int64_t{1}, int64_t{0}}).reshape({1, 2}), target = at::tensor({int64_t{0}});
  const Tensor norm = mk::row_distance(rows, index, target, 2);
  EXPECT_NEAR(norm[0][0].item<double>(), 5, 1e-15);
  EXPECT(norm[0][1].item<double>() == 0);
  const Tensor slope = gradient(norm.sum(), rows, true);
  EXPECT_NEAR(slope[0][0].item<double>(), -0.6, 1e-15);
  EXPECT_NEAR(slope[1][1].item<double>(), -0.8, 1e-15);
  EXPECT_NEAR(gradient(slope[1][0], rows)[1][0].item<double>(), (1 - 0.36) / 5, 1e-13);
}

void one_sample_against_all_others() {
  const Tensor logits = at::tensor({0.5, -2.0, 0.25, 3.0}, at::kDouble).reshape({2, 2}).requires_grad_();
  const auto [loss, column, normalizer] =
      mk::one_to_n(logits, at::tensor({int64_t{0}, int64_t{1}}), 1, "symmetric", false);
  // Sample 0: a = 0.5, its negative z[1,0] = 0.25. Sample 1: a = min(3, 1), its negative max(-2, -1).
  EXPECT_NEAR(loss[0].item<double>(), std::log1p(std::exp(0.25 - 0.5)), 1e-14);
  EXPECT_NEAR(loss[1].item<double>(), std::log1p(std::exp(-2)), 1e-14);
  const double s = 1 / (1 + std::exp(0.25));
  const Tensor slope = gradient(loss.sum(), logits, true);
  EXPECT_NEAR(slope[0][0].item<double>(), -s, 1e-13);
  EXPECT_NEAR(slope[1][0].item<double>(), s, 1e-13);
  EXPECT(slope[0][1].item<double>() == 0 && slope[1][1].item<double>() == 0);
  EXPECT_NEAR(gradient(slope[1][0], logits)[0][0].item<double>(), -s * (1 - s), 1e-12);
}

void a_step_to_the_nearest_boundary() {
  const Tensor gap = at::tensor({-10.0, -2.0}, at::kDouble).reshape({1, 2}).requires_grad_();
  const Tensor w = at::tensor({3.0, -4.0, 0.0, 1.0}, at::kDouble).reshape({1, 2, 2}).requires_grad_();
  const auto [step, distance, choice, norm] = mk::deepfool_step(gap, w, {}, std::numeric_limits<double>::infinity());
  EXPECT(choice.item<int64_t>() == 0);
  EXPECT_NEAR(distance.item<double>(), 10.0 / 7, 1e-15);
  EXPECT_NEAR(step[0][1].item<double>(), -10.0 / 7, 1e-15);
  EXPECT_NEAR(gradient(distance.sum(), gap)[0][0].item<double>(), -1.0 / 7, 1e-15);
  EXPECT_NEAR(gradient(distance.sum(), w)[0][0][1].item<double>(), 10.0 / 49, 1e-14);
}

// Row lengths around every vector width and unrolling, each tensor exactly as long as its rows: a step beyond a row is
// a step beyond the allocation, which AddressSanitizer sees.
void every_row_length_stays_inside_and_agrees_with_aten() {
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const double tolerance = type == at::kDouble ? 1e-12 : 2e-6;
    for (int64_t length = 2; length <= 140; length += length < 70 ? 1 : 7) {
      const Tensor row = at::randn({1, length}).to(type).requires_grad_();
      const Tensor wide = row.detach().to(at::kDouble).requires_grad_();
      const Tensor target = at::tensor({length / 2});
      for (const int64_t k : {int64_t{1}, std::min<int64_t>(3, length - 1), length - 1}) {
        const auto [gap, nll, phi, uniform, index, normalizer, valid] = mk::competitors(row, target, k, -100, true);
        EXPECT_NEAR(nll.item<double>(), -at::log_softmax(wide, 1)[0][length / 2].item<double>(), tolerance * 10);
        const Tensor sorted = std::get<0>(wide.detach().index_fill(1, target, -1e30).topk(k, 1));
        EXPECT_NEAR((gap.to(at::kDouble) + wide.detach()[0][length / 2]).sub(sorted).abs().max().item<double>() + 1, 1,
                    1e-6);
        const Tensor even = wide.detach().logsumexp(1) - wide.detach().mean(1);
        EXPECT_NEAR(uniform.item<double>(), even.item<double>(), tolerance * 10);
        EXPECT_NEAR(std::log1p(std::exp(-phi.item<double>())), nll.item<double>(), tolerance * 10);
        const Tensor slope = gradient(nll.sum(), row).to(at::kDouble);
        Tensor truth = at::softmax(wide.detach(), 1);
        truth[0][length / 2] -= 1;
        EXPECT((slope - truth).abs().max().item<double>() < (type == at::kBFloat16 ? 4e-3 : 5e-4));
      }
      // Rows around a tile of 16, with a negative for every class.
      for (const int64_t n : {int64_t{2}, int64_t{15}, int64_t{16}, int64_t{17}, int64_t{33}}) {
        const Tensor logits = at::randn({n, length}).to(type).requires_grad_(), labels = at::arange(n) % 2;
        const auto [loss, column, normalizer] = mk::one_to_n(logits, labels, 10, "symmetric", true);
        const Tensor z = logits.detach().to(at::kDouble), own = labels.unsqueeze(1) == at::arange(length);
        const Tensor negatives = z.masked_fill(own, -std::numeric_limits<double>::infinity()).logsumexp(0);
        EXPECT((column.to(at::kDouble) - negatives).abs().max().item<double>() < tolerance * 10);
        EXPECT((normalizer.to(at::kDouble) - z.logsumexp(1)).abs().max().item<double>() < tolerance * 10);
        EXPECT(gradient(loss.sum(), logits).isfinite().all().item<bool>());
      }
      for (const double p : {1.0, 2.0, 3.0, 4.0, std::numeric_limits<double>::infinity()}) {
        const double q = p == 1 ? std::numeric_limits<double>::infinity() : std::isinf(p) ? 1 : p / (p - 1);
        const Tensor norm = mk::dual_norm({row}, p, 1);
        EXPECT_NEAR(norm.item<double>(), at::linalg_vector_norm(wide.detach(), q).item<double>(), tolerance);
        EXPECT(gradient(norm.sum(), row).isfinite().all().item<bool>());
        const Tensor pair = at::randn({2, length}).to(type).requires_grad_();
        const Tensor apart = mk::row_distance(pair, at::ones({1, 1}, at::kLong), at::zeros({1}, at::kLong), p);
        const Tensor difference = pair.detach().to(apart.scalar_type()).to(at::kDouble);
        const Tensor truth = at::linalg_vector_norm((difference[1] - difference[0]).to(apart.scalar_type()), q);
        EXPECT_NEAR(apart.item<double>(), truth.item<double>(), tolerance);
        EXPECT(gradient(apart.sum(), pair).isfinite().all().item<bool>());
        const Tensor gap = at::full({1, 2}, -1.0, row.options());
        const Tensor candidates = pair.detach().reshape({1, 2, length}).clone().requires_grad_();
        const auto [step, distance, choice, size] = mk::deepfool_step(gap, candidates, {}, p);
        const Tensor chosen = candidates.detach()[0][choice.item<int64_t>()].to(at::kDouble);
        EXPECT_NEAR((chosen * step[0].detach().to(at::kDouble)).sum().item<double>(), 1,
                    type == at::kDouble ? 1e-12 : 0.05);
        EXPECT(gradient(distance.sum(), candidates).isfinite().all().item<bool>());
      }
    }
  }
}

void a_target_outside_the_classes_is_named() {
  std::string words;
  try {
    mk::competitors(at::zeros({2, 3}), at::tensor({int64_t{0}, int64_t{7}}), 1, -100, false);
  } catch (const c10::ValueError& error) {
    words = error.what_without_backtrace();
  }
  EXPECT(words == "target must be in [0, 3), got 7 at row 1");
}

}  // namespace

int main() {
  competitors_select_and_differentiate();
  norms_are_dual();
  a_hinge_on_the_distance();
  rows_at_a_distance();
  one_sample_against_all_others();
  a_step_to_the_nearest_boundary();
  every_row_length_stays_inside_and_agrees_with_aten();
  a_target_outside_the_classes_is_named();
  return report("ops");
}
