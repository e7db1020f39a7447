"""Presets: the losses that they stand for, written out, on a task whose medians are fixed."""

import math

import pytest
import torch
from torch import nn

import margin_kernels as mk
from margin_kernels import presets

GENERATOR = torch.Generator().manual_seed(3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def batch():
    return torch.randn(7, 6, generator=GENERATOR, dtype=torch.float64), torch.randint(4, (7,), generator=GENERATOR)


def fixed(task, medians):
    task.auto_gamma.median.copy_(torch.tensor(medians, dtype=torch.float64))
    task.auto_gamma.fixed.fill_(True)
    return task.eval()


def test_standard_is_cross_entropy_and_a_bounded_term_for_each_layer():
    model, (x, y) = network(), batch()
    out = fixed(mk.MarginTask(model, presets.standard(), layers=("input", "1")), [0.3, 0.7])(x, y)
    x = x.clone().requires_grad_()
    hidden = model[1](model[0](x))
    logits = model[2](hidden)
    label = torch.nn.functional.one_hot(y, 4).bool()
    phi = logits[label] - logits.masked_fill(label, -torch.inf).logsumexp(1) + math.log(3) / 2
    expected = torch.nn.functional.cross_entropy(logits, y)
    for tap, gamma in ((x, 0.3), (hidden, 0.7)):
        (slope,) = torch.autograd.grad(phi.sum(), tap, retain_graph=True)
        term = (gamma - phi / (1e-6 + slope.norm(dim=1))).clamp(0, gamma) / gamma
        expected = expected + term.mean() / 2
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_robust_is_cross_entropy_and_twice_a_bounded_term_at_the_input_in_second_order():
    model, (x, y) = network(), batch()
    task = fixed(mk.MarginTask(model, presets.robust(), layers=("input",)), [0.4])
    own = torch.autograd.grad(task(x, y)["loss"], list(model.parameters()))
    inputs = x.clone().requires_grad_()
    logits = model(inputs)
    label = torch.nn.functional.one_hot(y, 4).bool()
    gap = logits[label] - logits.masked_fill(label, -torch.inf).amax(1)
    (slope,) = torch.autograd.grad(gap.sum(), inputs, create_graph=True)
    term = (0.6 - gap / (1e-6 + slope.norm(dim=1))).clamp(0, 0.6) / 0.6
    expected = torch.nn.functional.cross_entropy(logits, y) + 2 * term.mean()
    for ours, reference in zip(own, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [presets.standard, presets.robust])
def test_changes_take_the_place_of_a_preset(make):
    loss = make(p="inf", margin_weight=0.5, warmup=3)
    assert (loss.p, loss.margin_weight, loss.warmup, loss.gamma, loss.alpha) == (float("inf"), 0.5, 3, "auto", 1.0)
    with pytest.raises(TypeError, match="no_such"):
        make(no_such=1)


def test_standard_with_hard_competitors_has_no_shift():
    loss = presets.standard(competitors="hard", top_k=2)
    assert (loss.competitors, loss.top_k, loss.soft_shift) == ("hard", 2, 0)
    assert presets.standard(soft_shift=0.25).soft_shift == 0.25


def test_the_default_layers_of_a_task_are_those_of_robust():
    assert mk.MarginTask(network(), presets.robust()).layers == ("input",)
