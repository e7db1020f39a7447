#include "redirected_edges.h"

#include "breadth_first.h"

namespace margin_kernels {

using torch::autograd::Edge;
using torch::autograd::Node;

RedirectedEdges::RedirectedEdges(const at::Tensor& root, const std::vector<Place>& places,
                                 const std::vector<at::Tensor>& ends)
    : root_(root) {
  const std::vector<Node*> nodes = breadth_first(root);
  std::vector<std::pair<Edge*, Edge>> changes;
  for (const auto& [node, number, end] : places) {
    TORCH_CHECK(node >= 0 && node < static_cast<int64_t>(nodes.size()), "no node ", node, " of ", nodes.size());
    auto& edges = nodes[node]->next_edges();
    TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(edges.size()), "no edge ", number, " of ", edges.size());
    TORCH_CHECK(end >= -1 && end < static_cast<int64_t>(ends.size()), "no end ", end, " of ", ends.size());
    changes.emplace_back(&edges[number], end < 0 ? Edge() : torch::autograd::impl::gradient_edge(ends[end]));
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
