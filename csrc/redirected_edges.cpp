#include "redirected_edges.h"

#include <torch/csrc/autograd/variable.h>

#include <unordered_set>

namespace margin_kernels {

using torch::autograd::Edge;
using torch::autograd::Node;

namespace {

// The nodes of the graph of `root`, in the order of graph_nodes in taps.py.
std::vector<Node*> breadth_first(const at::Tensor& root) {
  std::vector<Node*> nodes{root.grad_fn().get()};
  TORCH_CHECK(nodes[0] != nullptr, "root has no graph");
  std::unordered_set<Node*> seen{nodes[0]};
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (const Edge& edge : nodes[i]->next_edges()) {
      Node* next = edge.function.get();
      if (next != nullptr && seen.insert(next).second) nodes.push_back(next);
    }
  }
  return nodes;
}

}  // namespace

RedirectedEdges::RedirectedEdges(const at::Tensor& root, const std::vector<Place>& places) : root_(root) {
  const std::vector<Node*> nodes = breadth_first(root);
  std::vector<std::pair<Edge*, Edge>> changes;
  for (const auto& [node, number, leaf] : places) {
    TORCH_CHECK(node >= 0 && node < static_cast<int64_t>(nodes.size()), "no node ", node, " of ", nodes.size());
    auto& edges = nodes[node]->next_edges();
    TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(edges.size()), "no edge ", number, " of ", edges.size());
    changes.emplace_back(&edges[number], leaf ? torch::autograd::impl::gradient_edge(*leaf) : Edge());
  }
  for (auto& [edge, other] : changes) {
    std::swap(*edge, other);
    saved_.emplace_back(edge, other);
  }
}

void RedirectedEdges::restore() {
  for (auto it = saved_.rbegin(); it != saved_.rend(); ++it) std::swap(*it->first, it->second);
  saved_.clear();
}

}  // namespace margin_kernels
