#include "cut_gradients.h"

#include <torch/csrc/autograd/function.h>

#include <unordered_set>
#include <utility>

namespace margin_kernels {

using torch::autograd::Edge;
using torch::autograd::Node;

int64_t cut_gradients(const at::Tensor& root, const std::vector<at::Tensor>& sources) {
  std::unordered_set<Node*> ends;
  for (const at::Tensor& source : sources) {
    if (Node* node = source.grad_fn().get()) ends.insert(node);
  }
  Node* start = root.grad_fn().get();
  if (start == nullptr || ends.empty()) return 0;
  int64_t edges = 0;
  // Nodes whose gradients go nowhere: the ends, and those with edges to such nodes alone. Known once all edges are
  // done.
  std::unordered_set<Node*> dead(ends), seen(ends);
  seen.insert(start);
  std::vector<std::pair<Node*, size_t>> path{{start, 0}};
  while (!path.empty()) {
    auto& [node, number] = path.back();
    if (number < node->num_outputs()) {
      Node* next = node->next_edge(number++).function.get();
      if (next != nullptr && seen.insert(next).second) path.emplace_back(next, 0);
      continue;
    }
    bool cut = false, live = false;
    for (Edge& edge : node->next_edges()) {
      if (!edge.is_valid()) continue;
      if (dead.count(edge.function.get()) == 0) {
        live = true;
        continue;
      }
      edge = Edge();
      cut = true;
      ++edges;
    }
    if (cut && !live) dead.insert(node);
    path.pop_back();
  }
  return edges;
}

}  // namespace margin_kernels
