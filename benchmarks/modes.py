"""The steps that are measured: a loss, where it is tapped, how it comes to its gradients, and the passes that takes.

floor   how often a step needs each pass of floors.py, in units of one pass over the batch; by FLOPs each is F:

    loop            forward, k passes to the taps, a whole backward                                          (k + 3) F
    split           forward, k passes to taps and outputs, weights                                           (k + 2) F
    second order    for each pass its tangent, a forward pass without a graph; in the loop also its weights
    baseline        the floor of the step that computes the same loss, which it stands beside
    adversarial     cross-entropy, and by the iterations that each sample took: top_k passes to the input, one
                    if it is misclassified; a forward pass for every iteration but the first; a look at the last point;
                    samples that take part are repeated with a graph, "envelope" once in first order, "unrolled" for
                    every iteration in second
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from baselines import naive_gradient_penalty, naive_large_margin, one_to_n_table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import margin_kernels as mk
from margin_kernels.gradients.autograd_graph import Graph
from margin_kernels.gradients.split import NODES

# Of a batch x, y: the loss [].
Loss = Callable[[Tensor, Tensor], Tensor]
Floor = dict[str, float]
# Networks small enough for DeepFool in the loss, as in its papers; they start from a short training on digits.
ADVERSARIAL = ("mlp800", "lenet")
# Classes up to which the losses that ask for the gradients of all of them are run.
FEW_CLASSES = 10
BOTH = "input + hidden"


@dataclass(frozen=True)
class Mode:
    """A row of the table. `loss` and `k` name it; `module` makes the loss for MarginTask, `function` a loss of
    (model, x, y), or with taps of (model, x, y, layers)."""

    loss: str
    floor: Callable[[dict[str, Tensor]], Floor]  # of what the task measured
    passes: str = ""  # "loop", "split", "baseline", or "" where there is nothing to choose
    taps: str = ""  # "input + hidden", "hidden", "input"
    k: int | None = None
    order: int = 1
    module: Callable[[], nn.Module] | None = None
    function: Callable[..., Tensor] | None = None

    @property
    def name(self) -> str:
        k = "" if self.k is None else f"k = {self.k}"
        order = "second order" if self.order == 2 else ""
        return ", ".join(filter(None, (self.loss, order, k, self.taps, self.passes)))

    def layers(self, hidden: Sequence[str]) -> tuple[str, ...]:
        return {"": (), "input": ("input",), "hidden": tuple(hidden), BOTH: ("input", *hidden)}[self.taps]

    def task(self, model: nn.Module, hidden: Sequence[str], passes: str | None = None) -> mk.MarginTask:
        assert self.module is not None
        loss = self.module()
        layers = self.layers(hidden) if loss.needs == "taps" else None
        return mk.MarginTask(model, loss, layers, passes or self.passes or "auto")

    def of(self, model: nn.Module, hidden: Sequence[str]) -> Loss:
        if self.module is not None:
            task = self.task(model, hidden)
            return lambda x, y: task(x, y)["loss"]
        assert self.function is not None
        taps = (self.layers(hidden),) if self.taps in (BOTH, "hidden") else ()
        return lambda x, y: self.function(model, x, y, *taps)

    def auto_takes(self, model: nn.Module, hidden: Sequence[str], x: Tensor, y: Tensor) -> str:
        """ "loop" or "split", whichever passes="auto" takes."""
        loss = self.task(model, hidden, "auto")(x, y)["loss"]
        return "split" if any(node.name() in NODES for node in Graph(loss).nodes) else "loop"


def floor(
    to_input: float = 0,
    to_hidden: float = 0,
    to_outputs: float = 0,
    backward: float = 1,
    tangent: float = 0,
    weights: float = 0,
    forward: float = 1,
) -> Callable[[dict[str, Tensor]], Floor]:
    counts = {
        "forward": forward,
        "pass to input": to_input,
        "pass to hidden": to_hidden,
        "pass to outputs": to_outputs,
        "backward": backward,
        "tangent": tangent,
        "weights": weights,
        "optimiser": 1.0,
    }
    return lambda measured: {part: count for part, count in counts.items() if count}


def number_of_passes(counts: Floor) -> float:
    """Passes over the network, of which a whole backward has two: cross-entropy has 3."""
    return sum(count for part, count in counts.items() if part != "optimiser") + counts.get("backward", 0)


def adversarial_floor(top_k: int, gradient: str) -> Callable[[dict[str, Tensor]], Floor]:
    def counts(measured: dict[str, Tensor]) -> Floor:
        iterations, selected = measured["iterations"].double(), measured["selected"].double()
        boundaries = torch.where(measured["correct"], top_k, 1)  # that a step may go to
        searched = float((boundaries * iterations).mean())
        later = float((iterations - 1).clamp_min(0).mean())
        looks = float((iterations > 0).double().mean())
        twice = gradient == "unrolled"
        again = float((selected * iterations if twice else selected).mean())
        return floor(
            to_input=searched + again,
            backward=1 + again,
            tangent=looks + twice * again,
            weights=twice * again,
            forward=1 + later + again,
        )({})

    return counts


def _loop(taps: str, k: int) -> Callable[[dict[str, Tensor]], Floor]:
    return floor(to_hidden=k) if taps == "hidden" else floor(to_input=k)


def _split(taps: str, k: int) -> Callable[[dict[str, Tensor]], Floor]:
    return floor(**{"to_outputs" if taps == "hidden" else "to_input": k}, backward=0, weights=1)


CROSS_ENTROPY = Mode("cross-entropy", floor(), function=lambda model, x, y: cross_entropy(model(x), y))


def large_margin() -> list[Mode]:
    """The margin loss alone, with cross-entropy, with the pairwise logistic loss, by tangents, and as baselines."""
    modes = []
    for taps, k in ((BOTH, 1), (BOTH, 5), (BOTH, 9), ("hidden", 1)):
        alone = partial(mk.LargeMarginLoss, top_k=k)
        modes += [
            Mode("large margin", _loop(taps, k), "loop", taps, k, module=alone),
            Mode("large margin", _split(taps, k), "split", taps, k, module=alone),
            Mode("large margin + CE", _loop(taps, k), "loop", taps, k, module=partial(alone, cross_entropy_weight=1.0)),
        ]
    for taps in (BOTH, "hidden"):
        soft = partial(mk.LargeMarginLoss, competitors="soft", cross_entropy_weight=1.0)
        modes += [
            Mode("soft margin + CE", _loop(taps, 1), "loop", taps, module=soft),
            Mode("soft margin + CE", _split(taps, 1), "split", taps, module=soft),
        ]
        pairwise = partial(mk.LargeMarginLoss, cross_entropy_weight=1.0, auxiliary="pairwise")
        modes.append(Mode("large margin + pairwise", _split(taps, 1), "split", taps, 1, module=pairwise))
    plain = partial(mk.LargeMarginLoss, cross_entropy_weight=1.0, backend="reference")
    modes.append(Mode("large margin + CE, reference ops", _loop(BOTH, 1), "loop", BOTH, 1, module=plain))
    twice = partial(mk.LargeMarginLoss, second_order=True)
    loop, split = floor(to_input=1, tangent=1, weights=1), floor(to_input=1, backward=0, tangent=1, weights=1)
    return [
        *modes,
        Mode("large margin", _loop(BOTH, 1), "baseline", BOTH, 1, function=naive_large_margin),
        Mode("large margin", loop, "loop", BOTH, 1, order=2, module=twice),
        Mode("large margin", split, "split", BOTH, 1, order=2, module=twice),
        Mode("large margin", loop, "baseline", BOTH, 1, 2, function=partial(naive_large_margin, second_order=True)),
    ]


def sensitivity(classes: int) -> list[Mode]:
    one = partial(mk.MarginSensitivityLoss, top_k=1)
    loop, split = floor(to_input=1, tangent=1, weights=1), floor(to_input=1, backward=0, tangent=1, weights=1)
    modes = [
        Mode("sensitivity, 1 candidate", loop, "loop", "input", 1, order=2, module=one),
        Mode("sensitivity, 1 candidate", split, "split", "input", 1, order=2, module=one),
    ]
    if classes > FEW_CLASSES:
        return modes
    every = floor(to_input=classes, tangent=1, weights=1)
    others = classes - 1
    return [
        *modes,
        Mode("sensitivity", every, "loop", "input", others, order=2, module=mk.MarginSensitivityLoss),
        Mode("sensitivity", every, "baseline", "input", others, order=2, function=naive_gradient_penalty),
    ]


def adversarial() -> list[Mode]:
    modes = []
    for gradient in ("envelope", "unrolled"):
        for top_k in (2, 9):
            name = f"adversarial MIN EXP, {gradient}, {top_k + 1} candidates"
            module = partial(mk.AdversarialMarginLoss, gradient=gradient, top_k=top_k)
            order = 2 if gradient == "unrolled" else 1
            modes.append(Mode(name, adversarial_floor(top_k, gradient), order=order, module=module))
    return modes


def of_network(name: str, classes: int) -> list[Mode]:
    """The rows of a network, cross-entropy first."""
    return [
        CROSS_ENTROPY,
        *large_margin(),
        *sensitivity(classes),
        *(adversarial() if name in ADVERSARIAL else []),
        Mode("1-to-N", floor(), module=mk.OneToNLoss),
        Mode("1-to-N", floor(), "baseline", function=one_to_n_table),
    ]


def compiled(mode: Mode, model: nn.Module, hidden: Sequence[str]) -> Loss | str:
    """The compiled loss, or why there is none: the one place that knows what can be compiled."""
    if mode.module is not None:
        task = mode.task(model, hidden)
        task.compile()
        return lambda x, y: task(x, y)["loss"]
    if mode.taps:
        return "the step asks for activation gradients, for which torch.compile has no graph"
    return torch.compile(mode.of(model, hidden))
