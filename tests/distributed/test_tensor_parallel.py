"""Margin losses on models that several processes share: a table of layouts, taps, losses and strategies.

Every cell is trained for three steps of SGD beside the same model in one process. Either all that is compared agrees
(the loss, what was measured at the taps, the gradient of every parameter at each step, the parameters at the end), or
the step is refused with words that say what to do.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support.processes import NIGHTLY
from torch import Tensor, nn
from torch.nn import functional as F

import margin_kernels as mk

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


def named(cells: list[tuple[Any, ...]], size: int) -> list[Any]:
    marks = NIGHTLY if size == 3 else ()
    return [pytest.param(size, *c, marks=marks, id=f"{size}-{c[0]}-{'+'.join(c[1])}-{c[2]}-{c[3]}") for c in cells]


@pytest.mark.parametrize(
    ("size", "layout", "taps", "loss", "passes", "what"), [*named(CELLS, 2), *named(CELLS_OF_THREE, 3)]
)
def test_a_shared_model_trains_as_in_one_process_or_is_refused(
    processes, size, layout, taps, loss, passes, what
) -> None:
    for found in processes(size).run(cell, layout, taps, loss, passes):
        assert found == EXACT if what == EXACT else what in found


def by_hand(rank: int, size: int, layout: str, loss: str, tap: str) -> str:
    """A loop of the user's own: the loss on logits and one activation, or on the model."""
    from torch.distributed.tensor import init_device_mesh

    shared, alone, x, y, given = models(init_device_mesh("cpu", (size,)), layout)

    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        handle = model.get_submodule(tap).register_forward_hook(lambda module, args, output: kept.append(output))
        logits = model(x)
        handle.remove()
        chosen = losses()[loss]()
        rest = {"taps": (kept,), "logits": (), "model": (model, x)}[chosen.needs]
        value = chosen(logits, y, *rest)
        value.backward()
        return [full(value), *(full(p.grad) for p in model.parameters())]

    try:
        found = gradients(shared, given)
    except ValueError as error:
        return str(error)
    return verdict(found, gradients(alone, x))


BY_HAND = [
    *(("sharded head", loss, "l2", EXACT) for loss in ("hard", "hard and cross-entropy", "soft", "1-to-N", "envelope")),
    *(("DTensors", loss, "l1", EXACT) for loss in ("soft", "two competitors", "second order", "sensitivity")),
    ("DTensors, samples sharded", "sensitivity", "l1", EXACT),
    ("plain head", "soft", "l1", f"tap 'activations[0]' holds {PART}"),
    ("sharded head", "sensitivity", "l2", SECOND_ORDER),
    *(("head of parts", loss, "l2", PART_OF_LOGITS) for loss in ("hard", "envelope", "1-to-N")),
]


@pytest.mark.parametrize(("layout", "loss", "tap", "what"), BY_HAND)
def test_losses_without_a_task(processes, layout, loss, tap, what) -> None:
    for found in processes(2).run(by_hand, layout, loss, tap):
        assert found == EXACT if what == EXACT else what in found


def beside_training(rank: int, size: int, layout: str, tap: str) -> dict[str, str]:
    """What else is measured on a model."""
    from torch.distributed.tensor import init_device_mesh

    warnings.simplefilter("ignore")
    shared, alone, x, y, _ = models(init_device_mesh("cpu", (size,)), layout)
    pair = [mk.MarginTask(model, losses()["soft"]()) for model in (shared, alone)]
    y = y % 3  # in the range of a part of the logits

    def logits(model: nn.Module) -> Tensor:
        z = model(x)
        return z.full_tensor() if hasattr(z, "full_tensor") else z

    def monitored(model: nn.Module) -> list[Tensor]:
        with mk.MarginMonitor(model, (tap, "output")) as monitor:
            F.cross_entropy(logits(model), y).backward()
        return [monitor.distances()]

    def without_gradients(guard: Any) -> str:
        with guard():
            found, expected = (task(x, y) for task in pair)
        partial = [out.pop("partial") for out in (found, expected)]
        assert partial == [True, True]
        return verdict([found[key] for key in expected], list(expected.values()))

    def compiled() -> str:
        pair[0].compile(backend="eager")
        return verdict([pair[0](x, y)["loss"].detach()], [pair[1](x, y)["loss"].detach()])

    searched = ("perturbation", "distance", "label")
    asked = {
        "no_grad": lambda: without_gradients(torch.no_grad),
        "no_grad again": lambda: without_gradients(torch.no_grad),
        "inference_mode": lambda: without_gradients(torch.inference_mode),
        "explain": lambda: pair[0].explain(x, y).strategy,
        "monitor": lambda: verdict(monitored(shared), monitored(alone)),
        "deepfool": lambda: verdict(
            *([getattr(mk.deepfool(m, x, max_iter=3), f) for f in searched] for m in (shared, alone))
        ),
        "compile": compiled,
    }
    said = {}
    for name, ask in asked.items():
        try:
            said[name] = ask()
        except ValueError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize(
    ("layout", "tap"),
    [("plain head", "l2"), ("sharded head", "a2"), ("gathered head", "l2"), ("DTensors", "l1"), ("sequence", "act")],
)
def test_what_else_is_measured_is_exact_but_steps_are_not_compiled(processes, layout, tap) -> None:
    for said in processes(2).run(beside_training, layout, tap):
        assert said.pop("explain") == "loop"
        assert "do not compile" in said.pop("compile")
        assert set(said.values()) == {EXACT}, said


def test_parts_are_refused_whatever_is_measured(processes) -> None:
    for said in processes(2).run(beside_training, "head of parts", "l2"):
        assert all(PART_OF_LOGITS in sentence for sentence in said.values()), said
    for said in processes(2).run(beside_training, "plain head", "l1"):
        assert PART in said["monitor"]


def of_all_processes(rank: int, size: int, loss: str, task: bool) -> str:
    from torch.distributed.tensor import init_device_mesh

    shared, _, x, y, _ = models(init_device_mesh("cpu", (size,)), "sharded head")
    chosen = losses()[loss]()
    chosen.process_group = "world"
    if task:
        call: Any = partial(mk.MarginTask(shared, chosen), x, y)
    else:
        x = x.requires_grad_()
        rest = {"taps": ([x],), "logits": (), "model": (shared, x)}[chosen.needs]
        call = partial(chosen, shared(x), y, *rest)
    with pytest.raises(ValueError, match="process_group must not hold processes that share the model") as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("task", [True, False])
@pytest.mark.parametrize("loss", ["soft", "sensitivity", "envelope", "1-to-N"])
def test_one_batch_is_not_counted_by_every_process_that_shares_the_model(processes, loss, task) -> None:
    assert all('mesh["data"]' in said for said in processes(2).run(of_all_processes, loss, task))


def parts_of_a_batch(rank: int, size: int, loss: str) -> float:
    """The processes divide the batch, and the model is shared by one process."""
    from torch import distributed
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("data", "tensor"))
    shared, alone, x, y, _ = models(mesh["tensor"], "DTensors")
    chosen = losses()[loss]()
    chosen.process_group = mesh["data"]
    part = slice(0, 2) if rank == 0 else slice(2, None)
    found = mk.MarginTask(shared, chosen)(x[part], y[part])["loss"].detach()
    distributed.all_reduce(found)
    return float(found / size - mk.MarginTask(alone, losses()[loss]())(x, y)["loss"].detach())


@pytest.mark.parametrize("loss", ["soft", "envelope", "1-to-N"])
def test_the_batch_may_be_divided_along_another_dimension(processes, loss) -> None:
    assert all(abs(difference) <= TOLERANCE for difference in processes(2).run(parts_of_a_batch, loss))


def on_a_part_of_the_mesh(rank: int, size: int) -> str:
    """Tensor parallelism along the second dimension of a mesh [1, processes]."""
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))["tensor"]
    shared, alone, x, y, given = models(mesh, "DTensors")
    taps = ("input", "l1")
    found = trained(mk.MarginTask(shared, losses()["soft"](), taps), given, y)
    return verdict(found, trained(mk.MarginTask(alone, losses()["soft"](), taps), x, y))


def test_a_mesh_of_two_dimensions(processes) -> None:
    assert set(processes(2).run(on_a_part_of_the_mesh)) == {EXACT}


def sharded_along_the_other_dimension(rank: int, size: int, layout: str) -> str:
    """FSDP2 along the first dimension of the mesh, tensor parallelism along the second."""
    from torch.distributed.tensor import init_device_mesh

    from margin_kernels.distributed import fully_shard_task

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
    shared, alone, x, y, given = models(mesh["tensor"], layout)
    task = fully_shard_task(mk.MarginTask(shared, losses()["soft"]()), mesh=mesh["data"])
    return verdict(trained(task, given, y), trained(mk.MarginTask(alone, losses()["soft"]()), x, y))


@pytest.mark.parametrize("layout", ["sharded head", "DTensors"])
def test_a_shared_model_may_be_sharded_too(processes, layout) -> None:
    assert set(processes(2).run(sharded_along_the_other_dimension, layout)) == {EXACT}
