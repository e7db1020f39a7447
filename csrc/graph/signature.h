// What an autograd graph looks like, as bytes: two graphs of the same signature differ in the values of their tensors
// and in the arguments that their operations have saved, in nothing else that a proof about it reads.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <string>
#include <vector>

namespace margin_kernels {

struct GraphReading {
  std::vector<torch::autograd::Node*> nodes;  // breadth first, those of breadth_first.h
  // For each node its type, for one written in Python its name, whether it was made before `begin`, its edges as places
  // in `nodes`, and the shapes of its outputs. Empty where a shape is symbolic or nested.
  std::string signature;
};

// begin: a sequence number of autograd; leaves were never made before it.
GraphReading read_graph(const at::Tensor& root, uint64_t begin);

}  // namespace margin_kernels
