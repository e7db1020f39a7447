"""What a training step of a task does, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..backends import choose as backend_of
from ..gradients.choose import choose, reasons
from ..gradients.plan import make_plan
from ..gradients.split import Split, Trials
from .reading import Inputs

# The ops that a loss calls, by what it needs.
OPS_OF = {
    "taps": ("competitors", "dual_norm", "row_distance", "margin_hinge"),
    "logits": ("competitors", "one_to_n"),
    "model": ("competitors", "dual_norm", "deepfool_step"),
}


@dataclass(frozen=True)
class Explanation:
    """What one step of a task on one batch does; `print(task.explain(x, y))`.

    Attributes:
        strategy: "loop", "split" or "tangent", or "logits" and "model" for losses that measure at no tap
        reason: why this one, in a sentence
        refused: strategy -> why it is not taken: all reasons that are known, joined by "; "
        nodes: operations between the logits and the taps that are not proven row-local, each with the reason
        layers: the taps, in order
        passes: cost in forward passes F of the model, by the counts of `cost`; cross-entropy costs 3 F
        cost: how these passes come about
        backends: op -> backend that computes it here
        recorded_bytes: memory of the activation gradients that the step records beside what cross-entropy keeps
    """

    strategy: str
    reason: str
    refused: dict[str, str]
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    passes: float | None
    cost: str
    backends: dict[str, str]
    recorded_bytes: int

    def __str__(self) -> str:
        count = "not counted" if self.passes is None else f"{self.passes:g} F"
        lines = [
            f"strategy    {self.strategy}: {self.reason}",
            f"layers      {', '.join(self.layers) or 'none'}",
            f"cost        {count} = {self.cost}; cross-entropy 3 F",
            f"recorded    {self.recorded_bytes / 2**20:.1f} MiB of activation gradients",
            f"backends    {', '.join(f'{op}: {backend}' for op, backend in self.backends.items())}",
        ]
        lines += [f"not {name:<7} {reason}" for name, reason in self.refused.items()]
        lines += [f"node        {node}" for node in self.nodes]
        return "\n".join(lines)


def explained(task: Any, inputs: Inputs, y: Tensor, sample_weight: Tensor | None) -> Explanation:
    """As MarginTask.explain, of a MarginTask; runs the forward pass and the passes of the loss."""
    name = type(task.loss).__name__
    ops = {op: _backend_of(op, y.device, task.loss.backend) for op in OPS_OF[task.loss.needs]}
    if task.loss.needs == "logits":
        return Explanation("logits", f"{name} reads the logits alone", {}, (), (), 3.0, "F + 2 F", ops, 0)
    if task.loss.needs == "model":
        cost = f"F + 2 F, and up to {task.loss.max_iter} steps of DeepFool with their gradients"
        return Explanation("model", f"{name} searches the nearest boundary", {}, (), (), None, cost, ops, 0)
    made, captured = task._forward(inputs)
    same = captured.logits is made
    batch, captured = task._batches.at_taps(task.loss, made, captured, y, sample_weight)
    logits, label = batch.rows.logits, batch.label()
    with torch.no_grad():  # raises what a step would
        task.loss.logit_statistics(logits.detach(), batch.rows.target, **batch.weights)
    passes = task.loss.passes(task.passes)
    soft = (True,) if batch.rows.target.is_floating_point() else ()
    request = task.loss.request(logits.shape[-1], *soft)
    found = reasons(request, captured, logits)
    gradients = choose(passes, request, captured, logits, Trials(alone=True))
    why = {name: "; ".join(against) for name, against in found.items() if against and name != gradients.name}
    plan = make_plan(captured.slots[0] if captured.slots else captured, request)
    count = task.loss.count(logits) * max(len(captured.slots), 1) if plan.taps else 0
    runs = "1 pass" if count == 1 else f"{count} passes"
    cost, total = {
        "loop": (f"F + {runs} + 2 F", 3.0 + count),
        "split": (f"F + {runs} + F for the weights", 2.0 + count),
        "tangent": ("F + 1 pass + tangents F + F for the weights", 4.0),
    }[gradients.name]
    if gradients.name == "loop" and request.second_order and plan.taps:
        cost, total = (
            f"{cost} + {2 * request.competitors} F to differentiate the norms",
            total + 2.0 * request.competitors,
        )
    if not same:
        cost, total = f"{cost} + F with running statistics", total + 1
    recorded = 0
    if isinstance(gradients, Split):
        label = label.clamp(0, logits.shape[1] - 1)
        rivals = functional.competitors(logits.detach(), label, request.competitors, backend=task.loss.backend)
        gradients.norms(label, rivals.competitor)
        recorded = gradients.recorded_bytes
    reason = {
        "loop": "exact for every network",
        "split": "the graph proves that samples do not interact between the taps and the logits",
        "tangent": "the graph proves that samples do not interact, and the network is linear piece by piece",
    }[gradients.name]
    if passes != "auto":
        reason = f"asked for by passes={passes!r}"
    nodes = tuple(str(finding) for finding in captured.structure(plan.taps).findings) if plan.taps else ()
    return Explanation(gradients.name, reason, why, nodes, task.layers, total, cost, ops, recorded)


def _backend_of(op: str, device: torch.device, backend: str) -> str:
    """The backend that computes an op on tensors of that device."""
    return backend_of(op, (torch.empty(1, device=device),), backend)[0]
