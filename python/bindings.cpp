// margin_kernels._C: importing it registers the ops; its functions call the same dispatcher stubs as torch.ops, so what
// they return is differentiable. The only file that includes Python.h.
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/pybind.h>

#include "../csrc/cpu/simd_types.h"
#include "../csrc/graph/cut_gradients.h"
#include "../csrc/graph/gradient_edge.h"
#include "../csrc/graph/node_hooks.h"
#include "../csrc/graph/redirected_edges.h"
#include "../csrc/graph/signature.h"
#include "../csrc/loss_and_gradient.h"
#include "../csrc/margin_flags.h"
#include "../csrc/monitored.h"
#include "../csrc/ops.h"
#include "../csrc/soft_cotangent.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = MARGIN_KERNELS_TORCH_VERSION;
  info["cuda"] = bool(MARGIN_KERNELS_WITH_CUDA);
  info["compiler"] = __VERSION__;
  switch (margin_kernels::simd::instruction_set()) {
    case margin_kernels::simd::InstructionSet::AVX512:
      info["cpu"] = "AVX-512";
      break;
    case margin_kernels::simd::InstructionSet::AVX2:
      info["cpu"] = "AVX2";
      break;
    default:
      info["cpu"] = "baseline";
  }
  return info;
}

py::list node_hooks(const at::Tensor& root) {
  py::list found;
  for (const auto& [index, others, dicts] : margin_kernels::node_hooks(root)) {
    py::list callables;
    for (void* dict : dicts) {
      const auto hooks = py::reinterpret_borrow<py::object>(static_cast<PyObject*>(dict));
      if (!py::isinstance<py::dict>(hooks)) {
        callables.append(hooks);
        continue;
      }
      for (const auto& entry : py::reinterpret_borrow<py::dict>(hooks)) callables.append(entry.second);
    }
    found.append(py::make_tuple(index, callables, others));
  }
  return found;
}

py::tuple read_graph(const at::Tensor& root, uint64_t begin) {
  const auto found = margin_kernels::read_graph(root, begin);
  py::list nodes(found.nodes.size());
  for (size_t i = 0; i < found.nodes.size(); ++i) {
    nodes[i] = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(found.nodes[i]->getptr()));
  }
  return py::make_tuple(nodes, py::bytes(found.signature));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled ops of margin_kernels.";
  m.def("build_info", &build_info, "What this extension was built for and which instruction set it uses here.");
  m.def("competitors", &margin_kernels::competitors, py::arg("logits"), py::arg("target"), py::arg("k"),
        py::arg("ignore_index") = -100, py::arg("uniform") = false);
  m.def(
      "dual_norm",
      [](const std::vector<at::Tensor>& gradients, double p, int64_t batch_dims) {
        return margin_kernels::dual_norm(gradients, p, batch_dims);
      },
      py::arg("gradients"), py::arg("p"), py::arg("batch_dims") = 2);
  m.def("margin_hinge", &margin_kernels::margin_hinge, py::arg("gap"), py::arg("norm"), py::arg("gamma"),
        py::arg("cap"), py::arg("weight"), py::arg("min_norm"), py::arg("eps"), py::arg("aggregation"),
        py::arg("layer_reduction"));
  m.def("row_distance", &margin_kernels::row_distance, py::arg("rows"), py::arg("index"), py::arg("target"),
        py::arg("p"));
  m.def("one_to_n", &margin_kernels::one_to_n, py::arg("logits"), py::arg("target"), py::arg("delta"), py::arg("bound"),
        py::arg("cross_entropy"));
  m.def("deepfool_step", &margin_kernels::deepfool_step, py::arg("gap"), py::arg("gradients"), py::arg("active"),
        py::arg("p"));
  m.def("soft_cotangent", &margin_kernels::soft_cotangent, py::arg("logits"), py::arg("target"), py::arg("counted"));
  m.def("margin_flags", &margin_kernels::margin_flags, py::arg("gap"), py::arg("norm"), py::arg("distance"),
        py::arg("gamma"), py::arg("cap"), py::arg("min_norm"), py::arg("valid"));
  m.def("ranked_once", &margin_kernels::ranked_once, py::arg("logits"), py::arg("target"), py::arg("k"),
        py::arg("ignore_index"), py::arg("soft"));
  m.def(
      "loss_and_gradient",
      [](const at::Tensor& logits, const at::Tensor& target, const at::Tensor& gap, const at::Tensor& nll,
         const at::Tensor& index, const at::Tensor& normalizer, const at::Tensor& valid, const at::Tensor& norm,
         std::vector<double> gamma, std::vector<double> cap, std::vector<double> weight, std::vector<double> min_norm,
         double eps, double margin_weight, double cross_entropy_weight, std::string_view aggregation,
         std::string_view layer_reduction, bool mean, bool soft) {
        const margin_kernels::HingeNumbers numbers{
            std::move(gamma), std::move(cap),      std::move(weight), std::move(min_norm), eps,
            margin_weight,    cross_entropy_weight};
        return margin_kernels::loss_and_gradient(logits, target, gap, nll, index, normalizer, valid, norm, numbers,
                                                 aggregation, layer_reduction, mean, soft);
      },
      py::arg("logits"), py::arg("target"), py::arg("gap"), py::arg("nll"), py::arg("index"), py::arg("normalizer"),
      py::arg("valid"), py::arg("norm"), py::arg("gamma"), py::arg("cap"), py::arg("weight"), py::arg("min_norm"),
      py::arg("eps"), py::arg("margin_weight"), py::arg("cross_entropy_weight"), py::arg("aggregation"),
      py::arg("layer_reduction"), py::arg("mean"), py::arg("soft"));
  m.def("read_logit_gradient", &margin_kernels::read_logit_gradient, py::arg("g"), py::arg("z"), py::arg("given"),
        py::arg("p"), py::arg("known"), py::arg("other"), py::arg("rounding"));
  m.def("monitored_margins", &margin_kernels::monitored_margins, py::arg("found"), py::arg("norms"), py::arg("least"),
        py::arg("eps"));
  m.def("cut_gradients", &margin_kernels::cut_gradients, py::arg("root"), py::arg("sources"));
  py::class_<margin_kernels::RedirectedEdges>(m, "RedirectedEdges")
      .def(py::init<const at::Tensor&, const std::vector<margin_kernels::RedirectedEdges::Place>&,
                    const std::vector<at::Tensor>&>(),
           py::arg("root"), py::arg("places"), py::arg("ends"))
      .def("restore", &margin_kernels::RedirectedEdges::restore);
  m.def("at_gradient_edge", &margin_kernels::at_gradient_edge, py::arg("root"), py::arg("index"), py::arg("output"),
        py::arg("like"));
  m.def("leaves_like", &margin_kernels::leaves_like, py::arg("tensors"));
  m.def("read_graph", &read_graph, py::arg("root"), py::arg("begin"), "(nodes, signature) of a graph");
  m.def("node_hooks", &node_hooks, py::arg("root"),
        "(place of the node, its Python hooks, number of its other hooks) for each node that has hooks");
  py::class_<margin_kernels::SilencedHooks>(m, "SilencedHooks")
      .def(py::init<const at::Tensor&, const std::vector<int64_t>&>(), py::arg("root"), py::arg("nodes"))
      .def("restore", &margin_kernels::SilencedHooks::restore);
}
