// Argument checks: one wording for one mistake, the same as in margin_kernels/checks.py.
// Only shapes, dtypes and devices are read here, through symbolic sizes, so that the same checks serve the kernels and
// the shape functions; targets are checked where the kernel reads them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <string_view>
#include <vector>

namespace margin_kernels::check {

using at::Tensor;

inline const char* name_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kShort:
      return "int16";
    case at::kChar:
      return "int8";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    default:
      return c10::toString(type);
  }
}

inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }
// of a result that comes from several tensors
inline at::ScalarType accumulate_type(at::TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

inline bool is_floating(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

template <class Name>
void floating(const Name& name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(is_floating(tensor), name, " must be float64, float32, bfloat16 or float16, got ",
                   name_of(tensor.scalar_type()));
}

// logits [N, C]; with `positions` also [N, C, S], which has N S rows
inline void labelled_logits(const Tensor& logits, const Tensor& target, bool positions = false) {
  floating("logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2 || (positions && logits.dim() == 3), "logits must have shape [N, C], got ",
                    logits.sym_sizes());
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64 class indices, got ",
                   name_of(target.scalar_type()));
  const auto rows = logits.dim() == 3 ? logits.sym_size(0) * logits.sym_size(2) : logits.sym_size(0);
  const auto classes = logits.sym_size(1);
  TORCH_CHECK_VALUE(target.dim() == 1 && target.sym_size(0) == rows, "target must have shape [", rows,
                    "] to match logits, got ", target.sym_sizes());
  TORCH_CHECK_VALUE(target.device() == logits.device(), "target must be on the device of logits (", logits.device(),
                    "), got ", target.device());
  TORCH_CHECK_VALUE(classes >= 2, "logits must have at least 2 classes, got ", classes);
}

// Every entry of values [N] or [N, k], on the CPU, in [0, classes).
inline void classes(const char* name, const Tensor& values, int64_t classes) {
  const auto* data = values.const_data_ptr<int64_t>();
  const int64_t k = values.dim() == 2 ? values.size(1) : 1, inner = values.dim() == 2 ? values.stride(1) : 0;
  for (int64_t n = 0; n < values.size(0); ++n) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t value = data[n * values.stride(0) + j * inner];
      TORCH_CHECK_VALUE(value >= 0 && value < classes, name, " must be in [0, ", classes, "), got ", value, " at row ",
                        n);
    }
  }
}

inline void competitors(const Tensor& logits, const Tensor& target, int64_t k) {
  labelled_logits(logits, target, /*positions=*/true);
  const auto classes = logits.sym_size(1);
  TORCH_CHECK_VALUE(k >= 0 && classes - 1 >= k, "k must be in [0, ", classes - 1, "] for ", classes, " classes, got ",
                    k);
}

inline void p(double p) { TORCH_CHECK_VALUE(p >= 1, "p must be >= 1 (or inf), got ", p); }

inline void dual_norm(at::TensorList gradients, double p, int64_t batch_dims) {
  check::p(p);
  TORCH_CHECK_VALUE(batch_dims == 1 || batch_dims == 2, "batch_dims must be 1 ([N, *]) or 2 ([N, k, *]), got ",
                    batch_dims);
  TORCH_CHECK_VALUE(!gradients.empty(), "gradients must hold at least one tensor, got an empty list");
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor &g = gradients[i], &first = gradients[0];
    TORCH_CHECK_TYPE(is_floating(g), "gradients[", i, "] must be float64, float32, bfloat16 or float16, got ",
                     name_of(g.scalar_type()));
    TORCH_CHECK_VALUE(g.dim() >= batch_dims, "gradients[", i, "] must have at least ", batch_dims,
                      " dimensions, got shape ", g.sym_sizes());
    const auto lead = first.sym_sizes().slice(0, batch_dims);
    TORCH_CHECK_VALUE(g.sym_sizes().slice(0, batch_dims).equals(lead), "gradients[", i, "] must begin with ", lead,
                      " like gradients[0], got ", g.sym_sizes());
    TORCH_CHECK_VALUE(g.device() == first.device(), "gradients[", i, "] must be on the device of gradients[0] (",
                      first.device(), "), got ", g.device());
  }
}

inline bool known_aggregation(std::string_view name) {
  return name == "max" || name == "sum" || name == "mean" || name == "mean_distance";
}

inline void margin_hinge(const Tensor& gap, const Tensor& norm, const Tensor& gamma, const std::optional<Tensor>& cap,
                         const std::optional<Tensor>& weight, const std::optional<Tensor>& min_norm, double eps,
                         std::string_view aggregation, std::string_view layer_reduction) {
  floating("gap", gap);
  floating("norm", norm);
  TORCH_CHECK_VALUE(gap.dim() == 2 && gap.sym_size(1) >= 1, "gap must have shape [N, k] with k >= 1, got ",
                    gap.sym_sizes());
  TORCH_CHECK_VALUE(norm.dim() == 3 && norm.sym_size(0) == gap.sym_size(0) && norm.sym_size(1) == gap.sym_size(1) &&
                        norm.sym_size(2) >= 1,
                    "norm must have shape [", gap.sym_size(0), ", ", gap.sym_size(1), ", L] to match gap, got ",
                    norm.sym_sizes());
  TORCH_CHECK_VALUE(norm.device() == gap.device(), "norm must be on the device of gap (", gap.device(), "), got ",
                    norm.device());
  const auto layers = norm.sym_size(2);
  const auto per_layer = [&](const char* name, const Tensor& tensor) {
    floating(name, tensor);
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == layers, name, " must have shape [", layers,
                      "], one entry per layer, got ", tensor.sym_sizes());
    TORCH_CHECK_VALUE(tensor.device() == gap.device(), name, " must be on the device of gap (", gap.device(), "), got ",
                      tensor.device());
    TORCH_CHECK_VALUE(!tensor.requires_grad(), name, " must not require grad: it is a hyper-parameter");
  };
  per_layer("gamma", gamma);
  if (cap) per_layer("cap", *cap);
  if (weight) per_layer("weight", *weight);
  if (min_norm) per_layer("min_norm", *min_norm);
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and >= 0, got ", eps);
  TORCH_CHECK_VALUE(known_aggregation(aggregation), "aggregation must be one of max, sum, mean, mean_distance, got ",
                    aggregation);
  TORCH_CHECK_VALUE(layer_reduction == "mean" || layer_reduction == "sum",
                    "layer_reduction must be one of mean, sum, got ", layer_reduction);
}

inline void row_distance(const Tensor& rows, const Tensor& index, const Tensor& target, double p) {
  check::p(p);
  floating("rows", rows);
  TORCH_CHECK_VALUE(rows.dim() == 2, "rows must have shape [C, D], got ", rows.sym_sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index must be int64 class indices, got ",
                   name_of(index.scalar_type()));
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64 class indices, got ",
                   name_of(target.scalar_type()));
  TORCH_CHECK_VALUE(index.dim() == 2 && index.sym_size(1) >= 1, "index must have shape [N, k] with k >= 1, got ",
                    index.sym_sizes());
  TORCH_CHECK_VALUE(target.dim() == 1 && target.sym_size(0) == index.sym_size(0), "target must have shape [",
                    index.sym_size(0), "] to match index, got ", target.sym_sizes());
  TORCH_CHECK_VALUE(index.device() == rows.device(), "index must be on the device of rows (", rows.device(), "), got ",
                    index.device());
  TORCH_CHECK_VALUE(target.device() == rows.device(), "target must be on the device of rows (", rows.device(),
                    "), got ", target.device());
}

inline void one_to_n(const Tensor& logits, const Tensor& target, double delta, std::string_view bound) {
  labelled_logits(logits, target);
  TORCH_CHECK_VALUE(delta > 0 && std::isfinite(delta), "delta must be finite and > 0, got ", delta);
  TORCH_CHECK_VALUE(bound == "symmetric" || bound == "positive", "bound must be one of symmetric, positive, got ",
                    bound);
}

inline void deepfool_step(const Tensor& gap, const Tensor& gradients, const std::optional<Tensor>& active, double p) {
  check::p(p);
  floating("gap", gap);
  floating("gradients", gradients);
  TORCH_CHECK_VALUE(gap.dim() == 2 && gap.sym_size(1) >= 1, "gap must have shape [N, k] with k >= 1, got ",
                    gap.sym_sizes());
  TORCH_CHECK_VALUE(gradients.dim() >= 2 && gradients.sym_sizes().slice(0, 2).equals(gap.sym_sizes()),
                    "gradients must begin with ", gap.sym_sizes(), " like gap, got ", gradients.sym_sizes());
  TORCH_CHECK_VALUE(gradients.device() == gap.device(), "gradients must be on the device of gap (", gap.device(),
                    "), got ", gradients.device());
  if (!active) return;
  TORCH_CHECK_TYPE(active->scalar_type() == at::kBool, "active must be bool, got ", name_of(active->scalar_type()));
  TORCH_CHECK_VALUE(active->dim() == 1 && active->sym_size(0) == gap.sym_size(0), "active must have shape [",
                    gap.sym_size(0), "] to match gap, got ", active->sym_sizes());
  TORCH_CHECK_VALUE(active->device() == gap.device(), "active must be on the device of gap (", gap.device(), "), got ",
                    active->device());
}

inline void convolution_input_gradient(const Tensor& gradient, const Tensor& weight, at::IntArrayRef padding,
                                       at::IntArrayRef dilation, c10::SymIntArrayRef size) {
  const auto type = gradient.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, "gradient must be float32 or float64, got ",
                   name_of(type));
  TORCH_CHECK_TYPE(weight.scalar_type() == type, "weight must be ", name_of(type), " like gradient, got ",
                   name_of(weight.scalar_type()));
  TORCH_CHECK_VALUE(weight.device() == gradient.device(), "weight must be on the device of gradient (",
                    gradient.device(), "), got ", weight.device());
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.sym_numel() > 0, "weight must have shape [Co, Ci, kh, kw], got ",
                    weight.sym_sizes());
  std::vector<c10::SymInt> output;
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK_VALUE(padding[d] >= 0, "padding must not be negative, got ", padding[d]);
    TORCH_CHECK_VALUE(dilation[d] >= 1, "dilation must be at least 1, got ", dilation[d]);
    output.push_back(size[d] + 2 * padding[d] - (weight.sym_size(2 + d) - 1) * dilation[d]);
    TORCH_CHECK_VALUE(size[d] >= 1 && output[d] >= 1, "size ", size, " gives no output of a kernel of shape ",
                      weight.sym_sizes());
  }
  TORCH_CHECK_VALUE(gradient.dim() == 4 && gradient.sym_size(1) == weight.sym_size(0) &&
                        gradient.sym_size(2) == output[0] && gradient.sym_size(3) == output[1],
                    "gradient must have shape [N, ", weight.sym_size(0), ", ", output[0], ", ", output[1], "], got ",
                    gradient.sym_sizes());
}

}  // namespace margin_kernels::check
