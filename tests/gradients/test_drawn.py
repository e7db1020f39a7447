"""Drawn networks, over steps in which values change: every strategy gives the gradients of the loop, and the loop those
of a literal one. `make test-fuzz` draws 2,000."""

import os
import random
import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.drawn_networks import CLASSES, STEPS, Case, draw, literal, step_of
from support.gradients import is_split
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from margin_kernels import LargeMarginLoss, MarginSensitivityLoss, MarginTask
from margin_kernels.gradients import autograd_graph

CASES = int(os.environ.get("MARGIN_KERNELS_FUZZ", "100"))
COMPILED_CASES = max(CASES // 10, 1)
REFUSED = "is not proven by the graph|a second derivative is asked for|register_hook|reentrant"
# Per case; hypothesis draws the seeds, prints a failing one and remembers nothing between runs.
drawn = settings(
    max_examples=CASES, deadline=None, derandomize=CASES <= 100, database=None, suppress_health_check=list(HealthCheck)
)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(autograd_graph.refusal() is not None, reason="the compiled extension is missing"),
]


def loss_of(seed: int) -> LargeMarginLoss | MarginSensitivityLoss:
    choose = random.Random(seed + 7)
    p = choose.choice([1, 1.5, 2, 2, 2, "inf"])
    second = choose.random() < 0.4
    top_k = choose.choice([1, 1, 2, CLASSES - 1])
    if choose.random() < 0.5:
        return LargeMarginLoss(2.0, p, top_k=top_k, second_order=second)
    soft = choose.random() < 0.7
    return LargeMarginLoss(
        2.0,
        p,
        top_k=1 if soft else top_k,
        competitors="soft" if soft else "hard",
        second_order=second,
        cross_entropy_weight=choose.choice([0.0, 0.7]),
        class_weight=[0.5 + choose.random() for _ in range(CLASSES)] if choose.random() < 0.3 else None,
        label_smoothing=choose.choice([0.0, 0.0, 0.0, 0.1]),
        ignore_index=choose.choice([-100, 0]),
        soft_shift=choose.choice([0.0, 0.5]) if soft else 0.0,
    )


def steps(
    case: Case, loss, passes: str, compiled: bool = False
) -> tuple[list[list[Tensor | None]], list[Tensor], list[bool]]:
    """Gradients, losses and whether the split was taken, of each step."""
    model = case.build()
    task = MarginTask(model, loss, case.taps, passes)
    if compiled:
        task.compile(backend="aot_eager")
    gradients, losses, split = [], [], []
    for number, (x, y) in enumerate(case.batches()):
        step_of(model, number)
        if isinstance(loss, LargeMarginLoss):
            loss.gamma = 2.0 + number
        model.zero_grad()
        torch.manual_seed(number)
        value = task(x, y)["loss"]
        split.append(is_split(value))
        value.backward()
        gradients.append([p.grad for p in model.parameters()])
        losses.append(value.detach())
    return gradients, losses, split


def assert_close(found: list[Tensor | None], expected: list[Tensor | None], what: object) -> None:
    """Equal, and NaN at the same places: F.normalize of zeros has no second derivative in PyTorch."""
    scale = max((float(g.nan_to_num().abs().max()) for g in expected if g is not None), default=0.0)
    for one, other in zip(found, expected, strict=True):
        one = torch.zeros(()) if one is None else one
        other = torch.zeros(()) if other is None else other
        assert ((one - other).isnan() == (one.isnan() & other.isnan())).all(), what
        assert float((one - other).nan_to_num().abs().max()) <= 1e-8 * scale + 1e-12, what


@drawn
@given(st.integers(0, 2**31))
def test_auto_is_the_loop_and_the_loop_is_the_literal_one(progress, seed: int) -> None:
    progress(CASES)
    case, loss = draw(seed), loss_of(seed)
    with sdpa_kernel(SDPBackend.MATH) if loss.second_order else warnings.catch_warnings():
        try:
            loop = steps(case, loss, "loop")
        except ValueError as error:
            assert re.search(REFUSED, str(error)), (case, error)
            with pytest.raises(ValueError, match=REFUSED):
                steps(case, loss, "auto")
            return
        auto = steps(case, loss, "auto")
        for number in range(STEPS):
            assert torch.allclose(auto[1][number], loop[1][number], equal_nan=True)
            assert_close(auto[0][number], loop[0][number], (case, loss, number))
        if any(name in ("hook", "clamped", "retain") for name in case.blocks):
            return  # what they do to the measured gradient is their own business
        model = case.build()
        for number, (x, y) in enumerate(case.batches()):
            step_of(model, number)
            model.zero_grad()
            torch.manual_seed(number)
            value = literal(model, x, y, case.taps, 2.0 + number, loss)
            assert torch.allclose(value, loop[1][number], rtol=1e-9, atol=1e-11, equal_nan=True), (case, loss, number)
            value.backward()
            assert_close(loop[0][number], [p.grad for p in model.parameters()], (case, loss, number))


@settings(drawn, max_examples=COMPILED_CASES)
@given(st.integers(0, 2**31))
def test_compiled_steps_are_those_of_eager(progress, seed: int) -> None:
    progress(COMPILED_CASES)
    case, loss = draw(seed), loss_of(seed)
    with sdpa_kernel(SDPBackend.MATH):
        try:
            eager = steps(case, loss, "auto")
            compiled = steps(case, loss, "auto", compiled=True)
        except ValueError as error:
            assert re.search(REFUSED + "|cannot be compiled", str(error)), (case, error)
            return
    if "dropout" in case.blocks:
        return  # the masks of a recorded step are others
    for number in range(STEPS):
        assert torch.allclose(compiled[1][number], eager[1][number], rtol=1e-9, atol=1e-11, equal_nan=True), (
            case,
            loss,
            number,
        )
        assert_close(compiled[0][number], eager[0][number], (case, loss, number))


@pytest.mark.parametrize("seed", [3, 14, 15, 92, 65])
def test_steps_by_inductor_are_those_of_eager(seed: int) -> None:
    case, loss = draw(seed), LargeMarginLoss(2.0, top_k=1 + seed % 2)
    model, twin = case.build().float(), case.build().float()
    x, y = case.batches()[0]
    tasks = [MarginTask(net.eval(), loss, case.taps, batch_dim=0) for net in (model, twin)]
    tasks[0].compile()
    found, expected = (task(x.float(), y) for task in tasks)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
    found["loss"].backward()
    expected["loss"].backward()
    scale = max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        one, other = (torch.zeros(()) if p.grad is None else p.grad for p in (one, other))
        assert float((one - other).abs().max()) <= 1e-3 * scale, case
