// Edges of an autograd graph that nobody reads.
//
// To measure the gradient at the model's input (or behind a frozen stem), the task gives a tensor that needs no
// gradient a source node in the graph. Every later backward would then compute that gradient again and drop it: for the
// 5x5 convolution of mnist_cnn a tenth of the whole step. After the passes the edges that lead to the sources, and to
// nodes with no other edges (a flatten behind the input), are reset, and the layers skip the computation as they do for
// any input that needs no gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace margin_kernels {

// Resets every edge of the graph of `root` that leads to the nodes that made `sources` and nowhere else; returns how
// many there were. A node is freed with its last edge: what is reset here must not be walked afterwards.
int64_t cut_gradients(const at::Tensor& root, const std::vector<at::Tensor>& sources);

}  // namespace margin_kernels
