"""Every wrong call of every op: the same exception with the same sentence on every backend, first word to last."""

import math
import re

import pytest
import torch

from margin_kernels import functional
from margin_kernels.testing import sample_gradients, sample_logits


def calls():
    """op -> arguments that are right, by name."""
    logits, target = sample_logits(4, 5)
    return {
        "competitors": dict(logits=logits, target=target, k=2),
        "dual_norm": dict(gradients=[sample_gradients(4, 2, 7), sample_gradients(4, 2, 3)], p=2),
        "row_distance": dict(rows=sample_gradients(5, 6), index=(target[:, None] + 1) % 5, target=target, p=2),
        "margin_hinge": dict(gap=torch.zeros(4, 3), norm=torch.ones(4, 3, 2), gamma=1.0),
        "one_to_n": dict(logits=logits, target=target),
        "deepfool_step": dict(gap=torch.ones(4, 2), gradients=sample_gradients(4, 2, 7), p=2),
    }


HALF = torch.zeros(4, 5, dtype=torch.int32)
WRONG = [
    ("competitors", dict(logits=HALF), TypeError, "logits must be float64, float32, bfloat16 or float16, got int32"),
    ("competitors", dict(logits=torch.zeros(4, 5, 1)), ValueError, "logits must have shape [N, C], got [4, 5, 1]"),
    ("competitors", dict(logits=torch.zeros(4, 1)), ValueError, "logits must have at least 2 classes, got 1"),
    ("competitors", dict(target=torch.zeros(4)), TypeError, "target must be int64 class indices, got float32"),
    (
        "competitors",
        dict(target=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "target must have shape [4] to match logits, got [3]",
    ),
    (
        "competitors",
        dict(target=torch.tensor([0, 7, 1, 9])),
        ValueError,
        "target must be in [0, 5), got 7 at row 1",
    ),
    ("competitors", dict(k=5), ValueError, "k must be in [0, 4] for 5 classes, got 5"),
    ("competitors", dict(k=-1), ValueError, "k must be in [0, 4] for 5 classes, got -1"),
    ("dual_norm", dict(p=0.5), ValueError, "p must be >= 1 (or inf), got 0.5"),
    ("dual_norm", dict(p=math.nan), ValueError, "p must be >= 1 (or inf), got nan"),
    ("dual_norm", dict(p="two"), ValueError, "p must be >= 1 (or inf), got two"),
    ("dual_norm", dict(batch_dims=3), ValueError, "batch_dims must be 1 ([N, *]) or 2 ([N, k, *]), got 3"),
    ("dual_norm", dict(gradients=[]), ValueError, "gradients must hold at least one tensor, got an empty list"),
    (
        "dual_norm",
        dict(gradients=torch.zeros(4, 2, 3)),
        TypeError,
        "gradients must be a list of tensors, one per layer, got a single tensor: wrap it in a list",
    ),
    (
        "dual_norm",
        dict(gradients=[torch.zeros(4, 2, 3), torch.zeros(4, 3, 3)]),
        ValueError,
        "gradients[1] must begin with [4, 2] like gradients[0], got [4, 3, 3]",
    ),
    (
        "dual_norm",
        dict(gradients=[torch.zeros(4)]),
        ValueError,
        "gradients[0] must have at least 2 dimensions, got shape [4]",
    ),
    (
        "dual_norm",
        dict(gradients=[torch.zeros(4, 2, 3).long()]),
        TypeError,
        "gradients[0] must be float64, float32, bfloat16 or float16, got int64",
    ),
    ("row_distance", dict(p=0), ValueError, "p must be >= 1 (or inf), got 0"),
    ("row_distance", dict(rows=torch.zeros(5)), ValueError, "rows must have shape [C, D], got [5]"),
    ("row_distance", dict(index=torch.zeros(4, 1)), TypeError, "index must be int64 class indices, got float32"),
    (
        "row_distance",
        dict(index=torch.full((4, 1), 5)),
        ValueError,
        "index must be in [0, 5), got 5 at row 0",
    ),
    ("row_distance", dict(target=torch.full((4,), -1)), ValueError, "target must be in [0, 5), got -1 at row 0"),
    (
        "row_distance",
        dict(target=torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "target must have shape [4] to match index, got [3]",
    ),
    ("margin_hinge", dict(gap=torch.zeros(4)), ValueError, "gap must have shape [N, k] with k >= 1, got [4]"),
    ("margin_hinge", dict(norm=torch.ones(4, 3)), ValueError, "norm must have shape [N, k, L], got [4, 3]"),
    (
        "margin_hinge",
        dict(norm=torch.ones(4, 2, 2)),
        ValueError,
        "norm must have shape [4, 3, L] to match gap, got [4, 2, 2]",
    ),
    ("margin_hinge", dict(gamma=-1), ValueError, "gamma must be >= 0, got -1"),
    ("margin_hinge", dict(gamma=math.nan), ValueError, "gamma must be >= 0, got nan"),
    ("margin_hinge", dict(cap=[1.0, -2.5]), ValueError, "cap must be >= 0, got -2.5"),
    ("margin_hinge", dict(min_norm=torch.tensor(-1.0)), ValueError, "min_norm must be >= 0, got -1"),
    ("margin_hinge", dict(layer_weights=[-1.0, 1.0]), ValueError, "layer_weights must be >= 0, got -1"),
    (
        "margin_hinge",
        dict(layer_weights=torch.zeros(2)),
        ValueError,
        "layer_weights must not all be 0 with layer_reduction=mean, got [0.0, 0.0]",
    ),
    ("margin_hinge", dict(gamma=[1.0]), ValueError, "gamma must have shape [2], one entry per layer, got [1]"),
    ("margin_hinge", dict(eps=-1.0), ValueError, "eps must be finite and >= 0, got -1"),
    (
        "margin_hinge",
        dict(aggregation="median"),
        ValueError,
        "aggregation must be one of max, sum, mean, mean_distance, got median",
    ),
    ("margin_hinge", dict(reduction="max"), ValueError, "reduction must be one of mean, sum, none, got max"),
    ("margin_hinge", dict(layer_reduction="max"), ValueError, "layer_reduction must be one of mean, sum, got max"),
    ("one_to_n", dict(delta=0.0), ValueError, "delta must be finite and > 0, got 0"),
    ("one_to_n", dict(delta=math.nan), ValueError, "delta must be finite and > 0, got nan"),
    ("one_to_n", dict(bound="negative"), ValueError, "bound must be one of symmetric, positive, got negative"),
    ("one_to_n", dict(reduction="max"), ValueError, "reduction must be one of mean, sum, none, got max"),
    ("one_to_n", dict(target=torch.full((4,), 5)), ValueError, "target must be in [0, 5), got 5 at row 0"),
    ("one_to_n", dict(logits=torch.zeros(4)), ValueError, "logits must have shape [N, C], got [4]"),
    ("deepfool_step", dict(p=0.99), ValueError, "p must be >= 1 (or inf), got 0.99"),
    ("deepfool_step", dict(gap=torch.ones(4)), ValueError, "gap must have shape [N, k] with k >= 1, got [4]"),
    (
        "deepfool_step",
        dict(gradients=torch.ones(4, 3, 7)),
        ValueError,
        "gradients must begin with [4, 2] like gap, got [4, 3, 7]",
    ),
    ("deepfool_step", dict(active=torch.ones(4)), TypeError, "active must be bool, got float32"),
    (
        "deepfool_step",
        dict(active=torch.ones(3, dtype=torch.bool)),
        ValueError,
        "active must have shape [4] to match gap, got [3]",
    ),
]


@pytest.mark.parametrize("op,change,error,sentence", WRONG, ids=[f"{op}: {words}" for op, _, _, words in WRONG])
def test_a_wrong_argument_has_one_sentence_on_every_backend(backend, op, change, error, sentence):
    arguments = calls()[op] | change
    device = torch.get_default_device()  # the tensors of WRONG were made before it was set
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    if device.type == "cuda" and " at row " in sentence:
        return  # a GPU does not read its targets: they give NaN, which test_gpu.py asserts
    with pytest.raises(error) as caught:
        getattr(functional, op)(**arguments, backend=backend)
    assert type(caught.value) is error
    assert str(caught.value).split("\n")[0] == sentence


@pytest.mark.parametrize("op", list(calls()))
def test_the_same_call_without_the_mistake_runs(backend, op):
    result = getattr(functional, op)(**calls()[op], backend=backend)
    outputs = result if isinstance(result, tuple) else (result,)
    assert all(out.isfinite().all() for out in outputs if out is not None and out.is_floating_point())


ELSEWHERE = [
    ("competitors", "target", "target must be on the device of logits (cpu), got meta"),
    ("one_to_n", "target", "target must be on the device of logits (cpu), got meta"),
    ("row_distance", "index", "index must be on the device of rows (cpu), got meta"),
    ("row_distance", "target", "target must be on the device of rows (cpu), got meta"),
    ("margin_hinge", "norm", "norm must be on the device of gap (cpu), got meta"),
    ("deepfool_step", "gradients", "gradients must be on the device of gap (cpu), got meta"),
    ("deepfool_step", "active", "active must be on the device of gap (cpu), got meta"),
]


@pytest.mark.parametrize("op,name,sentence", ELSEWHERE, ids=[f"{op}: {name}" for op, name, _ in ELSEWHERE])
def test_a_tensor_on_another_device_is_named(op, name, sentence):
    arguments = {"active": torch.ones(4, dtype=torch.bool), **calls()[op]} if name == "active" else calls()[op]
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        getattr(functional, op)(**arguments, backend="reference")


def test_a_layer_on_another_device_is_named():
    gradients = [torch.ones(4, 2, 7), torch.ones(4, 2, 3, device="meta")]
    with pytest.raises(ValueError, match=r"^gradients\[1\] must be on the device of gradients\[0\] \(cpu\), got meta$"):
        functional.dual_norm(gradients, 2, backend="reference")
    gap, norm, gamma = torch.zeros(4, 3), torch.ones(4, 3, 2), torch.ones(2, device="meta")
    with pytest.raises(ValueError, match=r"^gamma must be on the device of gap \(cpu\), got meta$"):
        functional.margin_hinge(gap, norm, gamma, backend="reference")
