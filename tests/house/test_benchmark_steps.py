"""The steps of the table do the work that their floors say, by FLOPs, and a step that cannot be taken is no crash."""

import pytest
import torch
from modes import compiled, large_margin, of_network
from networks import NETWORKS, Network, VisionTransformer
from step import Row, Step

from margin_kernels.testing import flops


def ratios(network: str, batch: int) -> dict[str, float]:
    """FLOPs of each step over those of the passes of its floor."""
    step = Step(network, batch, "float32", channels_last=False, digits_steps=1)
    parts = {name: flops(run) for name, run in step.passes().runs(step.optimiser).items()}
    found = {}
    for mode in of_network(network, 10):
        if mode.passes != "baseline" and not mode.loss.startswith("adversarial"):
            step.run(loss := mode.of(step.model, step.hidden))  # the split backward is tried out
            measured = flops(lambda loss=loss: step.run(loss))
            found[mode.name] = measured / sum(count * parts[part] for part, count in mode.floor({}).items())
    return found


def test_a_step_does_the_work_of_its_floor() -> None:
    for name, ratio in ratios("mnist_cnn", 2).items():
        assert 0.95 < ratio < 1.01, name  # less, by what the kernel of the thin first convolution does uncounted


@pytest.mark.filterwarnings("ignore:batch norm in training mode")
def test_a_step_that_cannot_be_taken_is_refused_with_the_reason() -> None:
    step = Step("resnet20_bn", 2, "float32", channels_last=False, digits_steps=0)
    mode = next(mode for mode in of_network("resnet20_bn", 10) if mode.passes == "split")
    assert "batch norm in training mode" in Row(mode, step).refused


def test_what_attention_does_not_allow_is_refused(monkeypatch) -> None:
    small = Network(lambda: VisionTransformer(32, 16, 32, 2, 4, 10), ("blocks.*",), (3, 32, 32), 10, 2, 2)
    monkeypatch.setitem(NETWORKS, "small", small)
    step = Step("small", 2, "float32", channels_last=False, digits_steps=0)
    rows = [Row(mode, step) for mode in large_margin() if mode.k == 1 and mode.taps == "input + hidden"]
    first, second = ([row for row in rows if row.mode.order == order] for order in (1, 2))
    assert not any(row.refused for row in first if row.mode.passes != "baseline")
    reasons = {row.mode.passes: row.refused for row in second}
    assert "not possible" in reasons["split"] and "sdpa_kernel" in reasons["loop"]
    assert "not implemented" in reasons["baseline"]  # PyTorch's own words


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_leave_the_weights_as_they_are(dtype) -> None:
    step = Step("lenet5", 4, dtype, channels_last=True, digits_steps=0)
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    for mode in of_network("lenet5", 10)[:3]:
        step.run(mode.of(step.model, step.hidden))
    assert all(torch.equal(one, other) for one, other in zip(before, step.model.parameters(), strict=True))


def test_what_cannot_be_compiled_says_so() -> None:
    step = Step("lenet5", 4, "float32", channels_last=False, digits_steps=0)
    of = {mode.name: compiled(mode, step.model, step.hidden) for mode in of_network("lenet5", 10)}
    reasons = {name: loss for name, loss in of.items() if isinstance(loss, str)}
    assert all("activation gradients" in reason for reason in reasons.values())
    assert reasons.keys() == {name for name in of if "baseline" in name and "1-to-N" not in name}
