// A tensor without values at a place of an autograd graph.
//
// What enters a model with a graph of its own (the output of an encoder, parameters of functional_call) is an input of
// the split backward's node, like a parameter. The graph knows its node and output number, and nobody holds the tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace margin_kernels {

// `like` [*], without a graph, from now on output `output` of the node at `index` in the breadth-first order of the
// graph of `root`. Its values mean nothing.
at::Tensor at_gradient_edge(const at::Tensor& root, int64_t index, int64_t output, const at::Tensor& like);

// For each tensor a leaf of the same memory that requires a gradient and has no hooks.
std::vector<at::Tensor> leaves_like(const std::vector<at::Tensor>& tensors);

}  // namespace margin_kernels
