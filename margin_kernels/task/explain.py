"""What a training step of a task does, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """What one step of a task on one batch does; `print(task.explain(x, y))`.

    Attributes:
        strategy: "loop", "split" or "tangent", or "logits" and "model" for losses that measure at no tap
        reason: why this one, in a sentence
        refused: strategy -> why it is not taken
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
