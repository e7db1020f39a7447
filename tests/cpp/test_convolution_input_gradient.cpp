// The input gradient of a convolution for each instruction set: exact on small integers, and inside its memory.
#include <ATen/ATen.h>

#include "check.h"
#include "ops.h"

using at::Tensor;
using Pair = std::array<int64_t, 2>;

namespace {

void exact(int64_t n, int64_t outputs, int64_t inputs, Pair size, Pair kernel, Pair padding, Pair dilation) {
  for (const auto type : {at::kFloat, at::kDouble}) {
    const auto height = size[0] + 2 * padding[0] - (kernel[0] - 1) * dilation[0];
    const auto width = size[1] + 2 * padding[1] - (kernel[1] - 1) * dilation[1];
    const Tensor g = at::randint(-3, 4, {n, outputs, height, width}, type);
    const Tensor w = at::randint(-3, 4, {outputs, inputs, kernel[0], kernel[1]}, type);
    const Tensor x = at::empty({n, inputs, size[0], size[1]}, at::kDouble);
    const Tensor expected =
        std::get<0>(at::convolution_backward(g.to(at::kDouble), x, w.to(at::kDouble), {}, {1, 1}, padding, dilation,
                                             false, {0, 0}, 1, {true, false, false}));
    const Tensor found =
        margin_kernels::convolution_input_gradient(g, w, padding, dilation, c10::fromIntArrayRefSlow(size));
    EXPECT(found.scalar_type() == type && at::equal(found.to(at::kDouble), expected));
  }
}

}  // namespace

int main() {
  for (int64_t width = 1; width <= 40; ++width) exact(2, 3, 2, {width + 1, width}, {3, 3}, {1, 1}, {1, 1});
  for (int64_t k = 1; k <= 8; ++k) exact(2, 4, 1, {11, 13}, {k, 9 - k}, {k - 1, 3}, {1, 1});
  exact(2, 3, 1, {23, 19}, {3, 2}, {2, 7}, {4, 3});
  exact(2, 64, 1, {90, 60}, {5, 3}, {4, 1}, {2, 1});  // several bands of rows
  exact(0, 3, 1, {8, 8}, {3, 3}, {1, 1}, {1, 1});
  return report("convolution_input_gradient");
}
