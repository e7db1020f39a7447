"""Margin losses on models that several processes share: a table of layouts, taps, losses and strategies, which
tests/distributed/test_tensor_parallel*.py run.

Every cell is trained for three steps of SGD beside the same model in one process. Either all that is compared agrees
(the loss, what was measured at the taps, the gradient of every parameter at each step, the parameters at the end), or
the step is refused with words that say what to do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import margin_kernels as mk

from .processes import NIGHTLY

TOLERANCE = 1e-12
SAMPLES, CLASSES, WIDTH = 5, 7, 12  # 2 and 3 processes part samples and classes unevenly
EXACT = "exact"
PART = "a part of its activation on each process"
PART_OF_LOGITS = "a part of the logits on each process"
SECOND_ORDER = "a second derivative is asked for, and PyTorch loses it"


class Mlp(nn.Sequential):
    """[N,6] -> [N,7]."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.a1 = nn.Linear(6, WIDTH), nn.Tanh()
        self.l2, self.a2 = nn.Linear(WIDTH, WIDTH), nn.Tanh()
        self.head = nn.Linear(WIDTH, CLASSES)


class Tokens(nn.Module):
    """[N,12,5] -> [N,7]: layers of tokens, and the mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1 = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        self.norm2, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.embed(x))
        return self.head(self.norm2(self.down(self.act(self.up(h)))).mean(1))


class Convolutions(nn.Sequential):
    """[N,2,6,6] -> [N,7]; the first is one of few input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.a1 = nn.Conv2d(2, 4, 3), nn.Tanh()
        self.c2, self.flat, self.head = nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES)


def batch(kind: type) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = {Mlp: (6,), Tokens: (12, 5), Convolutions: (2, 6, 6)}[kind]
    x = torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def layouts() -> dict[str, tuple[type, Any, str]]:
    """name -> the network, its plan for parallelize_module, and how the model is given its input; without a plan it is
    replicated by distribute_module."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel as Columns
    from torch.distributed.tensor.parallel import RowwiseParallel as Rows
    from torch.distributed.tensor.parallel import SequenceParallel as Sequence

    trunk = {"l1": Columns(), "l2": Rows()}
    all_dtensors = {
        "l1": Columns(use_local_output=False),
        "l2": Rows(use_local_output=False),
        "head": Columns(use_local_output=False),
    }
    sequence = {
        "embed": Rows(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm1": Sequence(),
        "up": Columns(input_layouts=Shard(1), use_local_output=False),
        "down": Rows(output_layouts=Shard(1), use_local_output=False),
        "norm2": Sequence(),
        "head": Columns(use_local_output=False),
    }
    local_sequence = {
        **sequence,
        "embed": Rows(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm1": Sequence(use_local_output=True),
        "up": Columns(input_layouts=Shard(1)),
        "down": Rows(output_layouts=Shard(1)),
    }
    row_head = {"l1": Columns(output_layouts=Replicate()), "head": Rows(input_layouts=Replicate())}
    partial = {"input_layouts": Replicate(), "output_layouts": Partial()}
    return {
        "plain head": (Mlp, trunk, "plain"),
        "frozen trunk": (Mlp, trunk, "plain"),
        "sharded head": (Mlp, {**trunk, "head": Columns(use_local_output=False)}, "plain"),
        "gathered head": (Mlp, {**trunk, "head": Columns(output_layouts=Replicate())}, "plain"),
        "row head": (Mlp, row_head, "plain"),
        "partial head": (Mlp, {**row_head, "head": Rows(**partial, use_local_output=False)}, "plain"),
        "head of parts": (Mlp, {**trunk, "head": Columns()}, "plain"),
        "head of summands": (Mlp, {**row_head, "head": Rows(**partial)}, "plain"),
        "DTensors": (Mlp, all_dtensors, "plain"),
        "DTensors from the input on": (Mlp, all_dtensors, "Replicate"),
        "DTensors, samples sharded": (Mlp, all_dtensors, "Shard"),
        "sequence": (Tokens, sequence, "plain"),
        "sequence from the input on": (Tokens, sequence, "Replicate"),
        "sequence of plain tensors": (Tokens, local_sequence, "plain"),
        "replicated": (Mlp, None, "plain"),
        "replicated from the input on": (Mlp, None, "Replicate"),
        "replicated, samples sharded": (Mlp, None, "Shard"),
        "replicated convolutions": (Convolutions, None, "Replicate"),
    }


def losses() -> dict[str, Any]:
    def margin(**options: Any) -> Any:
        return lambda: mk.LargeMarginLoss(gamma=3.0, **options)

    def adversarial(gradient: str, aggregation: str = "avg") -> Any:
        options = {"weight": 0.5, "c": 0.5, "max_iter": 2, "gradient": gradient, "aggregation": aggregation}
        return lambda: mk.AdversarialMarginLoss(**options)

    soft = {"competitors": "soft", "cross_entropy_weight": 1.0}
    return {
        "hard": margin(),
        "hard and cross-entropy": margin(cross_entropy_weight=1.0),
        "soft": margin(**soft),
        "two competitors": margin(top_k=2, aggregation="sum"),
        "gamma auto": lambda: mk.LargeMarginLoss(gamma="auto", warmup=1, **soft),
        "second order": margin(second_order=True),
        "sensitivity": mk.MarginSensitivityLoss,
        "unrolled": adversarial("unrolled"),
        "first order": adversarial("first_order"),
        "envelope": adversarial("envelope", "min"),
        "1-to-N": lambda: mk.OneToNLoss(cross_entropy=True),
    }


def models(mesh: Any, layout: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Tensor]:
    """The shared model, the same in one process, its input and targets, and the input that the shared one gets."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    kind, plan, given = layouts()[layout]
    torch.manual_seed(1)
    alone = kind().double()
    shared = copy.deepcopy(alone)
    if plan is not None:
        parallelize_module(shared, mesh, plan)
    elif given == "plain":
        distribute_module(
            shared,
            mesh,
            input_fn=lambda module, inputs, mesh: (DTensor.from_local(inputs[0], mesh, [Replicate()]),),
            output_fn=lambda module, output, mesh: output.to_local(),
        )
    else:
        distribute_module(shared, mesh)
    if layout == "frozen trunk":
        for model in (shared, alone):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("head"))
    x, y = batch(kind)
    placement = {"Replicate": Replicate(), "Shard": Shard(0)}.get(given)
    return shared, alone, x, y, x if placement is None else distribute_tensor(x, mesh, [placement])


def full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(task: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """All that three steps show."""
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        out = task(x, y)
        out["loss"].backward()
        seen += [full(out[name]) for name in ("loss", "output", "distance", "norm", "nll") if name in out]
        seen += [full(parameter.grad) for parameter in task.parameters() if parameter.requires_grad]
        optimizer.step()
    return seen + [full(parameter) for parameter in task.parameters()]


def verdict(found: list[Tensor], expected: list[Tensor]) -> str:
    assert [t.shape for t in found] == [t.shape for t in expected]
    worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True))
    return EXACT if worst <= TOLERANCE else f"off by {worst:.1e}"


def cell(rank: int, size: int, layout: str, taps: tuple[str, ...], loss: str, passes: str) -> str:
    """ "exact", the largest difference, or the words of the refusal."""
    from torch.distributed.tensor import init_device_mesh

    warnings.simplefilter("ignore")
    shared, alone, x, y, given = models(init_device_mesh("cpu", (size,)), layout)
    make = losses()[loss]
    how = {"layers": taps, "passes": passes} if make().needs == "taps" else {}
    try:
        found = trained(mk.MarginTask(shared, make(), **how), given, y)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return verdict(found, trained(mk.MarginTask(alone, make(), **how), x, y))


FIRST_ORDER = ("hard", "hard and cross-entropy", "soft", "two competitors", "gamma auto")
SECOND = ("second order", "sensitivity")
SEARCHES = ("first order", "envelope")
# What is no large margin loss of first order.
OTHERS = (*SECOND, *SEARCHES, "unrolled", "1-to-N")
INPUT = ("input",)
# (layout, taps, losses, passes) -> what becomes of it
TABLE: list[tuple[str, tuple[str, ...], tuple[str, ...], str, str]] = [
    # Every layout: first order is exact, second order where no plain tensor becomes a DTensor behind the tap.
    ("plain head", INPUT, (*FIRST_ORDER, *SEARCHES, "1-to-N"), "auto", EXACT),
    ("sequence", INPUT, (*FIRST_ORDER, "envelope", "1-to-N"), "auto", EXACT),
    *(
        (layout, INPUT, ("hard", "soft", *SEARCHES, "1-to-N"), "auto", EXACT)
        for layout in ("sharded head", "gathered head", "row head", "partial head", "DTensors", "replicated")
    ),
    ("sharded head", ("input", "l2", "a2", "output"), FIRST_ORDER, "auto", EXACT),
    ("sequence of plain tensors", INPUT, ("hard", "soft", "1-to-N"), "auto", EXACT),
    *(
        (layout, INPUT, (*SECOND, "unrolled"), "auto", SECOND_ORDER)
        for layout in ("plain head", "sharded head", "gathered head", "DTensors", "sequence", "replicated")
    ),
    *(
        (layout, INPUT, (*FIRST_ORDER[2:4], *SECOND, "1-to-N"), "auto", EXACT)
        for layout in (
            "DTensors from the input on",
            "DTensors, samples sharded",
            "sequence from the input on",
            "replicated from the input on",
            "replicated, samples sharded",
            "replicated convolutions",
        )
    ),
    ("DTensors from the input on", INPUT, ("unrolled", *SEARCHES), "auto", "x must be a plain tensor for DeepFool"),
    # Taps: those that are whole, DTensors, parts.
    ("plain head", ("l2", "a2"), ("hard", "soft", "second order"), "auto", EXACT),
    ("sharded head", ("l2",), SECOND, "auto", SECOND_ORDER),
    ("plain head", ("l1",), ("hard", "sensitivity"), "auto", PART),
    ("plain head", ("l2", "a1"), ("soft",), "auto", f"tap 'a1' holds {PART}"),
    ("DTensors", ("l1", "a1", "l2"), ("hard", "soft", "two competitors", "second order"), "auto", EXACT),
    ("DTensors", ("a1",), ("sensitivity",), "auto", EXACT),
    ("sequence", ("embed", "norm1", "up", "down", "norm2"), ("hard", "second order"), "auto", EXACT),
    *(("sequence of plain tensors", (name,), ("hard",), "auto", PART) for name in ("embed", "norm1", "act", "down")),
    ("sequence of plain tensors", ("norm2",), ("hard", "soft"), "auto", EXACT),
    ("replicated convolutions", ("c1", "a1"), ("hard", "second order"), "auto", EXACT),
    # Logits: parts of them are refused by every loss.
    *(
        (layout, INPUT, ("hard", "sensitivity", "envelope", "1-to-N"), "auto", PART_OF_LOGITS)
        for layout in ("head of parts", "head of summands")
    ),
    # Strategies: the loop, and never the split.
    ("plain head", INPUT, ("soft",), "loop", EXACT),
    ("plain head", INPUT, ("soft",), "split", "a parameter is a DTensor"),
    ("plain head", ("a2",), ("soft", "second order"), "auto", EXACT),
    ("frozen trunk", INPUT, ("hard", "soft"), "auto", EXACT),
    ("frozen trunk", INPUT, ("soft",), "split", "an activation is a DTensor"),
]
CELLS = [(layout, taps, loss, passes, what) for layout, taps, names, passes, what in TABLE for loss in names]
# With three processes one of first and one of second order for each layout and its taps.
CELLS_OF_THREE = [c for c in CELLS if c[2] in ("soft", "sensitivity") and c[3] == "auto"]


def cells_of(*losses: str) -> list[Any]:
    """The cells of these losses as parameters of a test, with two processes and with three."""
    found = [(2, (), cell) for cell in CELLS] + [(3, NIGHTLY, cell) for cell in CELLS_OF_THREE]
    return [
        pytest.param(size, *c, marks=marks, id=f"{size}-{c[0]}-{'+'.join(c[1])}-{c[2]}-{c[3]}")
        for size, marks, c in found
        if c[2] in losses
    ]


def check_cell(
    processes: Callable[[int], Any], size: int, layout: str, taps: tuple[str, ...], loss: str, passes: str, what: str
) -> None:
    """Trains in the processes of the fixture of that name."""
    for found in processes(size).run(cell, layout, taps, loss, passes):
        assert found == EXACT if what == EXACT else what in found
