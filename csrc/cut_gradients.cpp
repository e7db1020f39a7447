#include "cut_gradients.h"

#include <torch/csrc/autograd/function.h>

#include <unordered_set>

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
  std::unordered_set<Node*> seen{start};
  std::vector<Node*> open{start};
  while (!open.empty()) {
    Node* node = open.back();
    open.pop_back();
    for (Edge& edge : node->next_edges()) {
      Node* next = edge.function.get();
      if (next == nullptr) continue;
      if (ends.count(next) != 0) {
        edge = Edge();
        ++edges;
      } else if (seen.insert(next).second) {
        open.push_back(next);
      }
    }
  }
  return edges;
}

}  // namespace margin_kernels
