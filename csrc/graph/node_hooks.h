// Hooks on the nodes of an autograd graph.
//
// A user's hook on an activation (Tensor.register_hook, retain_grad, a module's backward hook) is meant for the one
// backward of the loss. The passes that measure gradients run over the same nodes; while a SilencedHooks lives, the
// hooks of chosen nodes are not there. Python cannot see the hooks of a node, so they are listed here too.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace margin_kernels {

// Hooks of one node, at `index` in the breadth-first order of a graph.
struct NodeHooks {
  int64_t index;
  int64_t others;                // hooks that are not written in Python
  std::vector<void*> callables;  // borrowed PyObject*: dicts from a handle's number to what was registered
};

// Nodes of the graph of `root` that have hooks. Hooks that wait for the accumulated gradient of a leaf do not count:
// only a backward into .grad runs them.
std::vector<NodeHooks> node_hooks(const at::Tensor& root);

class SilencedHooks {
 public:
  // `nodes`: places in the breadth-first order of the graph of `root`.
  SilencedHooks(const at::Tensor& root, const std::vector<int64_t>& nodes);
  ~SilencedHooks() { restore(); }
  SilencedHooks(const SilencedHooks&) = delete;
  SilencedHooks& operator=(const SilencedHooks&) = delete;

  void restore();

 private:
  struct Held {
    torch::autograd::Node* node;
    std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>> pre, tensor_pre;
    std::unordered_map<size_t, std::unique_ptr<torch::autograd::FunctionPreHook>> retains_grad;
    std::vector<std::unique_ptr<torch::autograd::FunctionPostHook>> post;
  };
  static void swap(Held& held);

  at::Tensor root_;  // keeps the graph
  std::vector<Held> held_;
};

}  // namespace margin_kernels
