"""bench: what a step of each loss costs on the user's own model and batch.

    step     forward, loss, backward, SGD with momentum and learning rate 0, so that all steps see the same weights
    ratio    median over the rounds of time / time of cross-entropy in the same round, order drawn anew in every round
    floor    the passes that the step needs, each timed by itself in the same rounds, over the time of cross-entropy

    cross-entropy       forward, backward
    loop                forward, a pass to the taps for each competitor, backward
    split               forward, a pass to taps and layers for each competitor, weights
    tangent             the split, and a forward without a graph
    second order, loop  the loop, and a forward without a graph and the weights once more

all of them with the step of the optimizer.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .batchnorm import training_batchnorms
from .floors import Passes
from .gradients.request import Captured
from .losses import LargeMarginLoss
from .losses import base as options
from .task import Explanation, MarginTask
from .task.layout import layout_of
from .task.reading import Inputs, Reading
from .timing import peak_bytes, seconds_of_rounds

CROSS_ENTROPY = "cross-entropy"
# The pass to the taps by the package's own way.
OWN = "pass to taps, own kernel"
# Calls of a step in one measurement.
INNER = {"cuda": 3}
# name -> options of LargeMarginLoss, and the passes of the task.
STANDARD: dict[str, tuple[dict[str, Any], str]] = {
    "margin + cross-entropy, loop": ({"cross_entropy_weight": 1.0}, "loop"),
    "margin, split": ({}, "split"),
    "soft margin + cross-entropy": ({"competitors": "soft", "cross_entropy_weight": 1.0}, "auto"),
    "margin + cross-entropy, second order": ({"second_order": True, "cross_entropy_weight": 1.0}, "auto"),
}


@dataclass(frozen=True)
class BenchRow:
    """What a step of one loss costs; the figures are None where it is refused.

    Attributes:
        loss: its name
        milliseconds: median time of a step
        ratio: to cross-entropy, the median over the rounds
        spread: the quartiles of this ratio over the rounds
        floor: time of the passes that the step needs, to cross-entropy; None where they are not counted
        peak_bytes: largest sum of live bytes that PyTorch's allocator gave during a step
        memory: peak_bytes to that of cross-entropy
        strategy: how the gradients are obtained, as `MarginTask.explain` says
        reason: why so
        refused: why the step cannot be taken, None where it can
    """

    loss: str
    milliseconds: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    floor: float | None = None
    peak_bytes: int | None = None
    memory: float | None = None
    strategy: str = ""
    reason: str = ""
    refused: str | None = None


@dataclass(frozen=True)
class BenchTable:
    """What `bench` measured; `print(table)`, `table.rows`, `table.to_frame()`.

    Attributes:
        rows: a BenchRow for each loss, cross-entropy first
        passes: name of a pass -> median milliseconds, of those that the floors are made of
        about: device, threads, batch, rounds and versions, in words
        notes: what has no floor, and why
    """

    rows: tuple[BenchRow, ...]
    passes: dict[str, float]
    about: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("loss", "time", "quartiles", "floor", "ms", "memory", "MiB", "strategy")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells if len(line) == len(head)) for i in range(len(head))]
        widths[0] = max(len(line[0]) for line in cells)
        lines = [self.about]
        for line in cells:
            first, *middle = line
            padded = [text.rjust(width) for text, width in zip(middle[:-1], widths[1:-1], strict=False)]
            lines.append("  ".join([first.ljust(widths[0]), *padded, middle[-1]]).rstrip())
        lines.append("")
        lines += [f"{row.loss}: {row.reason}" for row in self.rows if row.reason]
        lines += self.notes
        return "\n".join(lines)

    __repr__ = __str__

    def to_frame(self) -> Any:
        """A pandas.DataFrame with a row for each loss."""
        import pandas

        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["spread_low"], row["spread_high"] = row.pop("spread") or (None, None)
        return pandas.DataFrame(rows).set_index("loss")


def _cells(row: BenchRow) -> tuple[str, ...]:
    if row.ratio is None or row.spread is None or row.peak_bytes is None or row.milliseconds is None:
        return row.loss, f"refused: {row.refused}"
    low, high = row.spread
    return (
        row.loss,
        f"{row.ratio:.2f}",
        f"{low:.2f} to {high:.2f}",
        "-" if row.floor is None else f"{row.floor:.2f}",
        f"{row.milliseconds:.1f}",
        "-" if row.memory is None else f"{row.memory:.2f}",
        f"{row.peak_bytes / 2**20:.1f}",
        row.strategy,
    )


class _Batch:
    """One batch of the user's on a copy of the model, whose weights all tasks, steps and passes share."""

    def __init__(self, model: nn.Module, x: Any, y: Tensor, autocast: torch.dtype | None, task: dict[str, Any]) -> None:
        self.model, self.y, self.options = copy.deepcopy(model), y, task
        self.inputs = Inputs((), dict(x)) if isinstance(x, Mapping) else Inputs((x,), {})
        self.reading = Reading(task.get("output"), task.get("call"))
        self.device, self.dtype = y.device.type, autocast
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=0.0, momentum=0.9)
        self.gradients = [torch.zeros_like(parameter) for parameter in self.trained]
        self.logits = self.tangent()

    def about(self, rounds: int) -> str:
        """What was measured, in words."""
        where = torch.cuda.get_device_name(self.y.device) if self.device == "cuda" else self.device
        dtype = next((str(p.dtype) for p in self.trained), "no parameters").removeprefix("torch.")
        parts = [
            where,
            f"{torch.get_num_threads()} threads",
            f"batch {len(self.y)}",
            dtype if self.dtype is None else f"{str(self.dtype).removeprefix('torch.')} autocast",
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters",
            f"{rounds} rounds",
            f"torch {torch.__version__}",
        ]
        return ", ".join(parts)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)

    def task(self, loss: nn.Module, passes: str) -> MarginTask:
        if getattr(loss, "needs", "taps") != "taps":
            given = {name: self.options[name] for name in ("output", "call", "class_dim") if name in self.options}
            return MarginTask(self.model, loss, **given)
        return MarginTask(self.model, loss, passes=passes, **self.options)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.reading(self.model, self.inputs)

    def cross_entropy(self) -> Tensor:
        made = self.reading(self.model, self.inputs)
        layout = layout_of(made, self.y, self.options.get("class_dim"))
        if layout.class_dim == 1:
            return cross_entropy(made, self.y)
        rows = layout.rows(made, self.y, None, None)
        return cross_entropy(rows.logits, rows.target)

    def loss(self, task: MarginTask) -> Tensor:
        found: Tensor = task(*self.inputs.args, target=self.y, **self.inputs.kwargs)["loss"]
        return found

    def tangent(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def step(self, task: MarginTask | None) -> Tensor:
        """A training step of a task, or of cross-entropy; the loss [], detached."""
        with self.autocast():
            loss = self.cross_entropy() if task is None else self.loss(task)
        loss.mean().backward()
        self.optimizer_step(None)
        return loss.detach().mean()

    def optimizer_step(self, gradients: list[Tensor] | None) -> None:
        for parameter, gradient in zip(self.trained, gradients or (), strict=False):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def passes(self, task: MarginTask) -> dict[str, Callable[[], Any]]:
        """The passes that floors are made of, with the taps of a task."""
        if self.logits.dim() != 2 or self.logits.shape[1] == 1:
            raise ValueError(f"one prediction of several classes a sample is counted, got {list(self.logits.shape)}")
        labels = (self.y.argmax(1) if self.y.is_floating_point() else self.y).clamp(0, self.logits.shape[1] - 1)

        def capture(model: nn.Module) -> Captured:
            return task._taps.capture(model, self.inputs, self.reading)

        passes = Passes(self.model, labels, capture, self.autocast)
        calls: dict[str, Callable[[], Any]] = {
            "tangent": self.tangent,
            "backward": passes.backward,
            "pass to outputs": partial(passes.bare, passes.outputs),
            "weights": passes.weights,
        }
        own = passes.own_pass()
        return calls if own is None else {**calls, "pass to taps": partial(passes.bare, passes.taps), OWN: own}


class _Step:
    """The step of one row, or why it is refused. Cross-entropy, which has no task, is not."""

    def __init__(self, batch: _Batch, loss: nn.Module | None, passes: str = "auto") -> None:
        self.task: MarginTask | None = None
        self.explained: Explanation | None = None
        self.refused: str | None = None
        self.logits = batch.logits
        self.run: Callable[[], Tensor] = partial(batch.step, None)
        self.bytes = 0
        try:
            if loss is not None:
                self.task = batch.task(loss, passes)
                with batch.autocast():
                    self.explained = self.task.explain(*batch.inputs.args, target=batch.y, **batch.inputs.kwargs)
                self.run = partial(batch.step, self.task)
            value = float(self.run())
            if not math.isfinite(value):
                raise ValueError(f"x and y must give a finite loss, got {value}")
            self.bytes = peak_bytes(self.run, batch.device)
        except (ValueError, RuntimeError) as error:
            batch.optimizer.zero_grad()
            if loss is None:
                raise
            self.refused = str(error).splitlines()[0]

    def reason(self) -> str:
        """Why the gradients are obtained so: where "auto" fell back to the loop, what stands in the way."""
        if self.task is None or self.explained is None:
            return ""
        name = "tangent" if getattr(self.task.loss, "second_order", False) else "split"
        if self.task.passes != "auto" or self.explained.strategy != "loop" or name not in self.explained.refused:
            return self.explained.reason
        return f"{self.explained.reason}; not {name}: {self.explained.refused[name]}"

    def floor(self, passed: bool) -> dict[str, float] | None:
        """How often the step needs each pass; None where that is not counted. passed: whether a tap needs a pass."""
        counts: dict[str, float] = {"forward": 1, "optimizer": 1}
        if self.task is None or self.explained is None or self.explained.strategy == "logits":
            return {**counts, "backward": 1}
        if self.explained.strategy == "model":
            return None
        if self.task.batchnorm == "frozen" and training_batchnorms(self.task.model):
            counts["forward"] = 2
        competitors = self.task.loss.count(self.logits)
        twice = {"tangent": 1.0, "weights": 1.0} if self.task.loss.second_order and passed else {}
        if self.explained.strategy == "loop":
            return counts | {"backward": 1} | ({"pass to taps": competitors} if passed else {}) | twice
        return counts | {"pass to taps and layers": competitors, "weights": 1} | twice


def bench(
    model: nn.Module,
    x: Any,
    y: Tensor,
    losses: Mapping[str, nn.Module] | None = None,
    layers: Sequence[str] | str | None = None,
    rounds: int = 15,
    autocast: torch.dtype | None = None,
    **task: Any,
) -> BenchTable:
    """What training steps cost on this model and batch: cross-entropy, the margin losses, and losses of yours.

        print(mk.bench(model, x, y, layers=("input", "layer3")))

    Everything runs on a copy of the model, in the mode (train or eval) in which it is; the model, its buffers,
    gradients and hooks are not touched, and random numbers go on as if nothing had run. A step that cannot be taken is
    a row with the reason. On a GPU times are between events.

    Args:
        model: classifier, as of MarginTask
        x: the input of one batch, on the model's device; a mapping is keywords of the model
        y: its targets, as of MarginTask
        losses: name -> a loss of margin_kernels.losses; rows after those that are always there
        layers: taps of losses that measure at taps, as of MarginTask
        rounds: how often each step and each pass is timed, >= 1
        autocast: None, or the dtype of autocast around every forward pass and loss
        task: further options of MarginTask: batchnorm, batch_dim, output, call, positions, ...

    Raises:
        ValueError, TypeError: wrong arguments; a model that no cross-entropy step can be taken on.
    """
    options.count("rounds", rounds)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}")
    unknown = set(losses or {}) & {CROSS_ENTROPY, *STANDARD}
    if unknown:
        raise ValueError(f"losses must have names of their own, got {sorted(unknown)[0]!r}")
    on_gpu = y.device.type == "cuda"
    with (
        torch.random.fork_rng([y.device] if on_gpu else []),
        torch.cuda.device(y.device) if on_gpu else nullcontext(),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of batch norm and gamma="auto": said where the user trains
        batch = _Batch(model, x, y, autocast, {"layers": layers, **task})
        batch.task(LargeMarginLoss(), "auto")  # wrong options are errors, not rows
        return _measured(batch, losses or {}, rounds)


def _measured(batch: _Batch, losses: Mapping[str, nn.Module], rounds: int) -> BenchTable:
    standard = {name: (LargeMarginLoss(**given), passes) for name, (given, passes) in STANDARD.items()}
    steps = {CROSS_ENTROPY: _Step(batch, None)}
    for name, (loss, how) in {**standard, **{name: (loss, "auto") for name, loss in losses.items()}}.items():
        steps[name] = _Step(batch, loss, how)
    runs: dict[str, Callable[[], Any]] = {name: step.run for name, step in steps.items() if step.refused is None}
    passes, notes = _passes(batch, [step.task for step in steps.values() if step.refused is None])
    times = seconds_of_rounds({**passes, **runs}, rounds, INNER.get(batch.device, 1), 1, batch.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    # Of two ways to the same gradients the floor takes the faster; a pass to taps and layers contains both others.
    if OWN in medians:
        medians["pass to taps"] = min(medians["pass to taps"], medians.pop(OWN))
    if "weights" in medians:
        outputs = medians.pop("pass to outputs")
        medians["backward"] = min(medians["backward"], outputs + medians["weights"])
        medians["pass to taps and layers"] = max(medians.get("pass to taps", 0.0), outputs)
    base = steps[CROSS_ENTROPY].bytes
    rows = []
    for name, step in steps.items():
        if step.refused is not None:
            rows.append(BenchRow(name, refused=step.refused))
            continue
        ratios = [taken / whole for taken, whole in zip(times[name], times[CROSS_ENTROPY], strict=True)]
        counts = step.floor("pass to taps" in passes)
        known = counts is not None and counts.keys() <= medians.keys()
        floor = sum(count * medians[part] for part, count in counts.items()) if counts and known else None
        rows.append(
            BenchRow(
                name,
                medians[name] * 1e3,
                statistics.median(ratios),
                (_quantile(ratios, 0.25), _quantile(ratios, 0.75)),
                None if floor is None else floor / medians[CROSS_ENTROPY],
                step.bytes,
                step.bytes / base if base else None,
                "" if step.explained is None else step.explained.strategy,
                step.reason(),
            )
        )
    milliseconds = {name: 1e3 * seconds for name, seconds in medians.items() if name not in steps}
    return BenchTable(tuple(rows), milliseconds, batch.about(rounds), notes)


def _passes(batch: _Batch, tasks: list[MarginTask | None]) -> tuple[dict[str, Callable[[], Any]], tuple[str, ...]]:
    """The passes of the floors by name, and a note where some cannot be timed by themselves."""
    calls: dict[str, Callable[[], Any]] = {
        "forward": batch.forward,
        "optimizer": partial(batch.optimizer_step, batch.gradients),
    }
    tapped = next((task for task in tasks if task is not None and task.layers), None)
    if tapped is None:
        return calls, ("floors: no loss that measures at taps can be taken, whose passes would be timed",)
    try:
        found = batch.passes(tapped)
        for call in found.values():
            call()
    except Exception as error:  # a module of the user's that cannot be called again by itself
        return calls, (f"floors: the passes cannot be timed by themselves ({str(error).splitlines()[0]})",)
    return {**calls, **found}, ()


def _quantile(values: Sequence[float], at: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(at))
