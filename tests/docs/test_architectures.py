"""The table of docs/gradients.md: which strategy an architecture gets, and that its gradients are those of the loop."""

import architectures
import pytest
import torch

ROWS = {row.name: row for row in architectures.rows()}
PAGE = architectures.PAGE.read_text()
# Architecture -> its cells: loop, split, tangent.
EXPECTED = {
    "MLP, ReLU": ("yes", "yes", "yes"),
    "ResNet, batch norm, training mode": ("yes", "`NativeBatchNormBackward0`", "`NativeBatchNormBackward0`"),
    "ResNet, batch norm, evaluation mode": ("yes", "yes", "`NativeBatchNormBackward0`"),
    "ConvNeXt block": ("yes", "yes", "`GeluBackward0`"),
    "BERT-like attention, written out": ("yes", "yes", "`NativeLayerNormBackward0`"),
    "attention in shifted windows (Swin)": ("yes", "yes", "`RollBackward0`"),
    "LSTM, time first": ("yes", "yes", "`MkldnnRnnLayerBackward0`"),
    "MLP on time-major tokens": ("yes", "yes", "yes"),
    "mixture of experts, samples sent to one by index": ("yes", "`IndexPutBackward0`", "`IndexPutBackward0`"),
    "mixup inside: h + h.flip(0)": ("yes", "`FlipBackward0`", "`FlipBackward0`"),
    "custom Function": ("`DoubledBackward`",) * 3,
    "custom Function, batch_dim=0": ("yes", "`DoubledBackward`", "`DoubledBackward`"),
    "custom Function, register_row_local": ("yes", "yes", "`RegisteredBackward`"),
    "checkpoint, use_reentrant=False": ("yes", "yes", "yes"),
    "checkpoint, use_reentrant=True": ("`CheckpointFunctionBackward`",) * 3,
}

pytestmark = pytest.mark.filterwarnings("ignore:batch norm in training mode")


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_gets_its_strategy_and_the_page_says_so(name) -> None:
    cells = architectures.cells(ROWS[name])
    assert tuple(cells[1:]) == EXPECTED[name]
    assert f"| {' | '.join(cells)} |\n" in PAGE


def test_every_architecture_is_on_the_page() -> None:
    shown = architectures.BLOCK.search(PAGE)[0]
    assert [line.split(" | ")[0] for line in shown.splitlines() if line.startswith("| ")][1:] == [
        "| ---",
        *(f"| {name}" for name in ROWS),
    ]


@pytest.mark.parametrize("second", [False, True], ids=["constant norms", "differentiated norms"])
@pytest.mark.parametrize("name", [name for name, cells in EXPECTED.items() if cells[0] == "yes"])
def test_auto_gives_the_gradients_of_the_loop(name, second) -> None:
    row = ROWS[name]
    found = {}
    for passes in ("auto", "loop"):
        task = row.task(passes, torch.float64, second)
        torch.manual_seed(2)
        out = task(*row.batch(torch.float64))
        out["loss"].backward()
        found[passes] = [parameter.grad for parameter in task.parameters()]
    assert sum(grad is not None and bool(grad.any()) for grad in found["loop"]) >= 2
    for auto, loop in zip(found["auto"], found["loop"], strict=True):
        assert (auto is None) == (loop is None)
        if loop is not None:
            torch.testing.assert_close(auto, loop, rtol=1e-9, atol=1e-9 * float(loop.abs().max()) + 1e-15)
