// The one order in which C++ and Python name the nodes of an autograd graph: gradients/autograd_graph.py walks alike.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <unordered_set>
#include <vector>

namespace margin_kernels {

// The nodes of the graph of `root`, breadth first; its own first.
inline std::vector<torch::autograd::Node*> breadth_first(const at::Tensor& root) {
  using torch::autograd::Node;
  std::vector<Node*> nodes{torch::autograd::impl::gradient_edge(root).function.get()};
  TORCH_CHECK(nodes[0] != nullptr, "root has no graph");
  std::unordered_set<Node*> seen{nodes[0]};
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (const torch::autograd::Edge& edge : nodes[i]->next_edges()) {
      Node* next = edge.function.get();
      if (next != nullptr && seen.insert(next).second) nodes.push_back(next);
    }
  }
  return nodes;
}

}  // namespace margin_kernels
