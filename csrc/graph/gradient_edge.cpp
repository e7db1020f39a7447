#include "gradient_edge.h"

#include "breadth_first.h"

namespace margin_kernels {

at::Tensor at_gradient_edge(const at::Tensor& root, int64_t index, int64_t output, const at::Tensor& like) {
  const auto nodes = breadth_first(root);
  TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(nodes.size()), "no node ", index, " of ", nodes.size());
  TORCH_CHECK(!like.requires_grad(), "like must have no graph");
  at::Tensor tensor = like.alias();
  torch::autograd::impl::set_gradient_edge(
      tensor, torch::autograd::Edge(nodes[index]->getptr(), static_cast<uint32_t>(output)));
  return tensor;
}

std::vector<at::Tensor> leaves_like(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> leaves;
  leaves.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) leaves.push_back(tensor.detach().set_requires_grad(true));
  return leaves;
}

}  // namespace margin_kernels
