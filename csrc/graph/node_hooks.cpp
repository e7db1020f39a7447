#include "node_hooks.h"

#include <torch/csrc/autograd/function_hook.h>

#include <cstring>
#include <typeinfo>
#include <utility>

#include "breadth_first.h"

namespace margin_kernels {

using torch::autograd::Node;

namespace {

// torch::autograd::PyFunction*Hook, whose first member is the dict of callables: torch's header of it needs that of
// Python, and its type is not exported, so it is told by its name.
struct PythonHook {
  virtual ~PythonHook() = default;
  void* dict;
};

template <class Hook>
void* dict_of(const Hook* hook) {
  if (std::strstr(typeid(*hook).name(), "PyFunction") == nullptr) return nullptr;
  return reinterpret_cast<const PythonHook*>(hook)->dict;
}

}  // namespace

std::vector<NodeHooks> node_hooks(const at::Tensor& root) {
  std::vector<NodeHooks> found;
  const auto nodes = breadth_first(root);
  for (size_t i = 0; i < nodes.size(); ++i) {
    NodeHooks hooks{static_cast<int64_t>(i), 0, {}};
    const auto add = [&](const auto* hook) {
      if (hook == nullptr) return;
      if (void* dict = dict_of(hook)) {
        hooks.callables.push_back(dict);
      } else {
        ++hooks.others;
      }
    };
    for (const auto& hook : nodes[i]->pre_hooks()) add(hook.get());
    for (const auto& hook : nodes[i]->tensor_pre_hooks()) add(hook.get());
    for (const auto& entry : nodes[i]->retains_grad_hooks()) add(entry.second.get());
    for (const auto& hook : nodes[i]->post_hooks()) add(hook.get());
    if (hooks.others > 0 || !hooks.callables.empty()) found.push_back(std::move(hooks));
  }
  return found;
}

SilencedHooks::SilencedHooks(const at::Tensor& root, const std::vector<int64_t>& nodes) : root_(root) {
  if (nodes.empty()) return;
  const auto order = breadth_first(root);
  for (const int64_t i : nodes) {
    TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(order.size()), "no node ", i, " of ", order.size());
  }
  held_.reserve(nodes.size());
  for (const int64_t i : nodes) {
    held_.push_back({order[i], {}, {}, {}, {}});
    swap(held_.back());
  }
}

void SilencedHooks::swap(Held& held) {
  held.node->pre_hooks().swap(held.pre);
  held.node->tensor_pre_hooks().swap(held.tensor_pre);
  held.node->retains_grad_hooks().swap(held.retains_grad);
  held.node->post_hooks().swap(held.post);
}

void SilencedHooks::restore() {
  for (Held& held : held_) swap(held);
  held_.clear();
}

}  // namespace margin_kernels
