#include "signature.h"

#include <cstring>
#include <typeinfo>
#include <unordered_map>

#include "breadth_first.h"

namespace margin_kernels {

using torch::autograd::Node;

namespace {

template <class Number>
void append(std::string& bytes, Number number) {
  bytes.append(reinterpret_cast<const char*>(&number), sizeof(number));
}

// False where a shape of an output is no row of integers.
bool append_shapes(std::string& bytes, const Node& node) {
  append<uint32_t>(bytes, node.num_inputs());
  for (uint32_t i = 0; i < node.num_inputs(); ++i) {
    const auto& output = node.input_metadata(i);
    if (output.was_default_constructed()) {
      append<int32_t>(bytes, -1);
      continue;
    }
    if (output.is_nested_tensor()) return false;
    const auto shape = output.shape_as_dim_vector();
    append<int32_t>(bytes, static_cast<int32_t>(shape.size()));
    for (const auto& size : shape) {
      if (size.is_symbolic()) return false;
      append<int64_t>(bytes, size.as_int_unchecked());
    }
  }
  return true;
}

}  // namespace

GraphReading read_graph(const at::Tensor& root, uint64_t begin) {
  GraphReading found{breadth_first(root), {}};
  std::unordered_map<const Node*, int32_t> place;
  for (const Node* node : found.nodes) place.emplace(node, static_cast<int32_t>(place.size()));
  std::string& bytes = found.signature;
  for (Node* node : found.nodes) {
    const char* type = typeid(*node).name();
    bytes.append(type, std::strlen(type) + 1);
    // All nodes of Functions in Python are of one type.
    if (std::strstr(type, "PyNode") != nullptr) bytes.append(node->name()).push_back('\0');
    const bool leaf = std::strstr(type, "AccumulateGrad") != nullptr;
    bytes.push_back(!leaf && node->sequence_nr() < begin ? 'b' : '-');
    append<uint32_t>(bytes, node->num_outputs());
    for (const auto& edge : node->next_edges()) {
      append<int32_t>(bytes, edge.is_valid() ? place.at(edge.function.get()) : -1);
      append<uint32_t>(bytes, edge.input_nr);
    }
    if (!append_shapes(bytes, *node)) {
      bytes.clear();
      break;
    }
  }
  return found;
}

}  // namespace margin_kernels
