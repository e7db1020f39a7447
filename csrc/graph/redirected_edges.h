// A backward pass over a part of an autograd graph.
//
// The engine runs whatever lies between the roots and the inputs that it is asked for. The split backward asks for
// less: the gradients of the weights from gradients of the activations that are known already, so nothing may flow from
// one layer to the next. While a RedirectedEdges lives, chosen edges lead nowhere, or to other leaves than the weights,
// whose hooks are then left alone; restored, the graph is what it was.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace margin_kernels {

class RedirectedEdges {
 public:
  // Place of an edge: its node in the breadth-first order of the graph of `root`, its number among the edges of that
  // node, and the number of the end in `ends` that it leads to from now on, or -1 for none.
  using Place = std::tuple<int64_t, int64_t, int64_t>;

  RedirectedEdges(const at::Tensor& root, const std::vector<Place>& places, const std::vector<at::Tensor>& ends);
  ~RedirectedEdges() { restore(); }
  RedirectedEdges(const RedirectedEdges&) = delete;
  RedirectedEdges& operator=(const RedirectedEdges&) = delete;

  void restore();

 private:
  at::Tensor root_;  // keeps the graph
  std::vector<std::pair<torch::autograd::Edge*, torch::autograd::Edge>> saved_;
};

}  // namespace margin_kernels
