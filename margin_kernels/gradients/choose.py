"""Which strategy obtains the gradients of a loss: the only place where "auto" is decided.

| strategy | what it is | order | exact for |
| --- | --- | --- | --- |
| loop | a pass for each competitor, ordinary backward | first, second | every network |
| split | weight gradients from those of the passes | first | networks whose samples provably do not interact |
| tangent | split, and one tangent pass for the norms | second, one competitor | such networks, linear piece by piece |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, TypeGuard

from torch import Tensor

from .loop import Loop
from .request import Captured, Request
from .split import NotExact, Split, Trials
from .tangent import TangentSplit

PASSES = ("auto", "loop", "split")
# Competitors up to which "auto" takes the split: it records the activation gradients of every pass, and from three on
# writing and reading them costs what it saves (CPU, split over loop: 0.82 and 0.85 for one and two competitors on
# mnist_cnn, 0.94 and 0.96 on mlp800; even at three, slower at nine).
SPLIT_UP_TO = 2


class Gradients(Protocol):
    """How the gradients of one forward pass are obtained.

    Attributes:
        name: of the strategy
        logits: what the loss reads: the logits, or a tensor in their place
    """

    name: str

    @property
    def logits(self) -> Tensor: ...

    def norms(self, target: Tensor, index: Tensor) -> Tensor:
        """D [N,k,L] of competitors index [N,k] against target [N]; runs the passes."""

    def measured(self, target: Tensor, index: Tensor) -> Tensor:
        """D as a constant."""

    def attach(self, loss: Tensor) -> Tensor:
        """The loss, with its way to the parameters."""


def takes_gradient(gradients: Gradients) -> TypeGuard[Split]:
    """Whether a strategy takes the gradient of the loss in the logits instead of a graph that leads to them."""
    return type(gradients) is Split


def check_passes(passes: str) -> str:
    """`passes` where it is a mode that exists. Raises ValueError else."""
    if passes not in PASSES:
        raise ValueError(f'passes must be one of "auto", "loop", "split", got {passes!r}')
    return passes


def choose(
    mode: str,
    request: Request,
    captured: Captured,
    logits: Tensor,
    trials: Trials | None = None,
    asked: str = 'passes="split"',
) -> Gradients:
    """The strategy for a request on one forward pass.

    Args:
        mode: "auto": the cheapest that is proven exact; "loop"; "split": the split or tangent, where an operation of
            which nothing is known is verified by a trial instead of refused
        request: what the loss asks for
        captured: the forward pass
        logits: what the loss is computed from
        trials: verdicts of earlier steps of the same task
        asked: what the user wrote, for the error

    Raises:
        ValueError: "split" is asked for and would not be exact, with the reason.
    """
    if captured.measuring:
        return Loop(replace(request, second_order=False), captured, logits)
    found = _of_this_process(mode, request, captured, logits, trials, asked)
    if captured.agree is None or captured.agree(found.name):
        return found
    if mode == "split":
        raise ValueError(f"{asked} is not possible on all processes")
    return Loop(request, captured, logits)


def _of_this_process(
    mode: str, request: Request, captured: Captured, logits: Tensor, trials: Trials | None, asked: str
) -> Gradients:
    if mode == "loop" or (mode == "auto" and request.competitors > SPLIT_UP_TO):
        return Loop(request, captured, logits)
    strategy = TangentSplit if request.second_order else Split
    try:
        return strategy(request, captured, logits, (trials or Trials()) if mode == "split" else None)
    except NotExact as reason:
        if mode == "split":
            raise ValueError(f"{asked} is not possible: {reason}") from reason
    return Loop(request, captured, logits)


def reasons(request: Request, captured: Captured, logits: Tensor) -> dict[str, list[str]]:
    """For each strategy all that is known against it, and why "auto" does not take it: nothing where it does."""
    found: dict[str, list[str]] = {}
    for strategy in (Split, TangentSplit):
        against = strategy.reasons(request, captured, logits)
        if request.competitors > SPLIT_UP_TO and strategy.second_order == request.second_order:
            against.append(f"slower than the loop from {SPLIT_UP_TO + 1} competitors on")
        found[strategy.name] = against
    taken = not all(found.values())
    return {**found, "loop": ["dearer than the strategy taken"] if taken else []}
