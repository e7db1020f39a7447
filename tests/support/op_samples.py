"""Arguments of every compiled op, forward and backward."""

from typing import Any

import torch

from margin_kernels.testing import sample_gradients, sample_logits


def op_samples() -> list[tuple[str, tuple[Any, ...]]]:
    """(name, arguments) of every compiled op, forward and backward, away from kinks."""
    logits, target = sample_logits(4, 7)
    logits.requires_grad_()
    gap, nll, phi, uniform, index, normalizer, _ = torch.ops.margin_kernels.competitors(logits, target, 2, 3, True)
    layers = [sample_gradients(3, 2, 5).requires_grad_(), sample_gradients(3, 2, 2, 2, seed=1).requires_grad_()]
    norms = torch.ops.margin_kernels.dual_norm(layers, 3.0, 2).detach()
    gaps, sizes = torch.randn(3, 2, requires_grad=True), (0.5 + torch.rand(3, 2, 2)).requires_grad_()
    gamma, cap = torch.tensor([0.5, 1.0]), torch.tensor([0.7, 0.9])
    hinge = (gaps, sizes, gamma, cap, None, torch.tensor([0.6, 0.0]), 1e-6, "max", "mean")
    rows, index = sample_gradients(7, 5, seed=2).requires_grad_(), (target[:, None] + torch.tensor([1, 3])) % 7
    pair_norms = torch.ops.margin_kernels.row_distance(rows, index, target, 3.0).detach()
    bounds = (1.0, "positive", True)
    loss, column, row_normalizer = (t.detach() for t in torch.ops.margin_kernels.one_to_n(logits, target, *bounds))
    active = torch.tensor([True, False, True])
    step, distance, choice, norm = (
        t.detach() for t in torch.ops.margin_kernels.deepfool_step(gaps, layers[1], active, 3.0)
    )
    step_grads = torch.randn_like(step).requires_grad_(), torch.randn_like(distance).requires_grad_()
    convolution = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(3, 1, 3, 2, requires_grad=True)
    return [
        ("competitors", (logits, target, 2)),
        ("competitors", (logits, target, 2, 3, True)),
        (
            "competitors_backward",
            (
                torch.randn_like(gap).requires_grad_(),
                torch.randn_like(nll).requires_grad_(),
                torch.randn_like(phi).requires_grad_(),
                torch.randn_like(uniform).requires_grad_(),
                logits,
                target,
                index,
                normalizer.detach(),
            ),
        ),
        ("dual_norm", (layers, 3.0, 2)),
        ("dual_norm_backward", (torch.randn_like(norms).requires_grad_(), layers, norms, 3.0, 2)),
        ("margin_hinge", hinge),
        ("margin_hinge_backward", (torch.randn(3, requires_grad=True), *hinge, True)),
        ("row_distance", (rows, index, target, 3.0)),
        (
            "row_distance_backward",
            (torch.randn_like(pair_norms).requires_grad_(), rows, index, target, pair_norms, 3.0),
        ),
        ("one_to_n", (logits, target, *bounds)),
        (
            "one_to_n_backward",
            (torch.randn_like(loss).requires_grad_(), logits, target, column, row_normalizer, *bounds),
        ),
        ("deepfool_step", (gaps, layers[1], active, 3.0)),
        ("deepfool_step_backward", (*step_grads, gaps, layers[1], choice, norm, active, 3.0)),
        ("convolution_input_gradient", (*convolution, (1, 0), (1, 2), (5, 6))),
    ]
