"""Adversarial margin losses: the distance that DeepFool finds, as a term of the loss.

    Delta(n)  DeepFool perturbation of sample n: T (classified correctly): until the prediction changes
                                                 F (misclassified): until the ground truth is predicted
    m(n)      = ||Delta||_p   ([A] eq. 6)    or   ||Delta||_p / ||x||_p   ([D] eq. 5)
    R         = sum over T of shrink(-c m) + sum over F of shrink(d m)
    total     = mean nll + weight R / N

The search for Delta runs without a graph; which boundary each step went to is kept. Where the loss needs gradients the
steps are then repeated with a graph, one backward pass for each instead of one for each candidate, and only for the
samples that take part.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..backends import BACKENDS
from ..batchnorm import running_statistics, training_batchnorms
from ..deepfool import Search, check_search, convolves, host_sees, search
from ..passes import pair_gradient
from ..random_state import RandomState
from ..reference.dual_norm import dual_exponent
from .options import choice, count, flag, norm_exponent, number

AGGREGATIONS = ("avg", "min")
SHRINKAGES = ("lin", "exp", "inv")
GRADIENTS = ("unrolled", "envelope", "first_order")
# No term counts more than this [A]; 1 / (1 - t) reaches it at t = 1 - 1 / TERM_LIMIT and has its pole behind.
TERM_LIMIT = 50.0
# MIN looks for its samples among this share of the batch [A].
MIN_SHARE = 0.2


class AdversarialMargins(NamedTuple):
    """What one evaluation of AdversarialMarginLoss shows; everything but `loss` is detached.

    loss [];  nll [N];  distance m [N], NaN where the logits are;  success [N] bool, whether the boundary was crossed;
    correct [N] bool, whether n is in T;  selected [N] bool, whether n takes part in R;  iterations [N];  label [N], the
    class predicted at x + Delta
    """

    loss: Tensor
    nll: Tensor
    distance: Tensor
    success: Tensor
    correct: Tensor
    selected: Tensor
    iterations: Tensor
    label: Tensor


class AdversarialMarginLoss(nn.Module):
    """Cross-entropy and a penalty on small DeepFool perturbations: Deep Defense and adversarial margin maximisation.

        m      = ||Delta||_p, or ||Delta||_p / ||x||_p with normalize       Delta: DeepFool, at most max_iter steps of
                                                                           (1 + overshoot) times the distance
        term   = shrink(-c m) where x is classified correctly, shrink(d m) where it is not, at most 50
        shrink = "lin" t | "exp" exp(t) | "inv" 1 / (1 - t)                d m <= ln(50 / weight + 1) for exp,
                                                                           <= 0.98 for inv
        total  = mean nll + weight / N * sum of terms over the samples that take part

    Args:
        weight: lambda >= 0.
        c, d: slopes > 0 for correctly classified and misclassified samples. With "avg" d draws the boundary towards the
            label of every misclassified sample: where many labels may be wrong, take a small one.
        aggregation: "avg": every sample takes part; "min": of the correctly classified, for each class the sample with
            the smallest m if it is among the int(0.2 N) smallest of the batch, of the misclassified for each class the
            one with the largest m if among the int(0.2 N) largest (at least one each). Samples whose boundary was not
            crossed are left out; R is divided by N all the same.
        shrinkage: "lin", "exp" or "inv".
        normalize: distances relative to the norm of the sample (Deep Defense).
        max_iter, overshoot, candidates: as in `deepfool`; candidates are the largest logits, fixed at x.
        gradient: "unrolled": through all steps, second order in the network. "first_order": the same steps with the
            gradients w of the scores taken as constants. "envelope": by the envelope theorem at the boundary point
            x* = x + Delta, d m = d g(x*) / ||grad_x g(x*)||_q with g the gap that x* closes; one forward and one
            backward pass, exact where Delta is the shortest way to the boundary.
        p: norm of the distances, in [1, inf]; float("inf") or "inf".
        backend: "auto" or a backend of margin_kernels.backends, for all ops.

    While Delta is computed batch norm uses running statistics, dropout holds its masks, and autocast is off. The layers
    must be twice differentiable for "unrolled".

    Presets: [A] MNIST: the defaults. [D]: weight 15, c 25, d 5, normalize, aggregation "avg".

    Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed.

    Sources: Yan, Guo, Zhang. Deep Defense. NeurIPS 2018 [D]. Yan, Guo, Zhang. Adversarial Margin Maximization Networks.
    TPAMI 2019 [A].
    """

    # What MarginTask gives it: the model and its input.
    needs = "model"

    def __init__(
        self,
        weight: float = 32.0,
        c: float = 2.0,
        d: float = 1.0,
        aggregation: str = "min",
        shrinkage: str = "exp",
        normalize: bool = False,
        max_iter: int = 5,
        overshoot: float = 0.02,
        candidates: int = 10,
        gradient: str = "unrolled",
        p: float | str = 2,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.weight = number("weight", weight, least=0)
        self.c = number("c", c, above=0)
        self.d = number("d", d, above=0)
        self.aggregation = choice("aggregation", aggregation, AGGREGATIONS)
        self.shrinkage = choice("shrinkage", shrinkage, SHRINKAGES)
        self.normalize = flag("normalize", normalize)
        self.max_iter = count("max_iter", max_iter)
        self.overshoot = number("overshoot", overshoot, least=0)
        self.candidates = count("candidates", candidates)
        self.gradient = choice("gradient", gradient, GRADIENTS)
        self.p = norm_exponent(p)
        self.backend = choice("backend", backend, ("auto", *BACKENDS))
        check_search(self.p, self.max_iter, self.overshoot, self.candidates)

    def forward(self, logits: Tensor, target: Tensor, model: nn.Module, x: Tensor) -> Tensor:
        """The loss [] of logits [N,C] = model(x) and target [N] int64; model and x [N,*] to measure distances with."""
        return self.margins(logits, target, model, x).loss

    def logit_statistics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the logits alone show, detached: gap, index [N,1] and nll [N]."""
        index, gap, nll = functional.competitors(logits, target, 1, backend=self.backend)
        return {"nll": nll, "gap": gap, "index": index}

    def margins(
        self,
        logits: Tensor,
        target: Tensor,
        model: nn.Module,
        x: Tensor,
        random: RandomState | None = None,
        source: Tensor | None = None,
    ) -> AdversarialMargins:
        """The loss and all that it measured on the way.

        random: the state of the random numbers from which logits = model(x) were computed, so that the distances are
        those of the same dropout masks; None: of masks drawn now.
        source: x as the graph of the logits has it, where it has it: the first DeepFool step is taken on that graph.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            raise ValueError(f"x must be a floating-point tensor [N, *], got {_description(x)}")
        nll = functional.competitors(logits, target, 1, backend=self.backend).nll
        # On a GPU a target outside [0, C) makes nll NaN; clamped, it is also safe to index with.
        target = target.clamp(0, logits.shape[1] - 1)
        x = x.detach()
        training = training_batchnorms(model)
        mixed = torch.is_autocast_enabled(x.device.type)
        # In half precision a step of two per cent beyond the boundary is often none.
        with (
            running_statistics(training) if training else nullcontext(),
            torch.autocast(x.device.type, enabled=False),
        ):
            held = _Held(model, x, random)
            wide = x if x.dtype == torch.float64 else x.float()
            # The forward pass of the loss, where it was that of the same function.
            same = not (training or mixed or (random is None and held.draws))
            found = search(
                held,
                wide,
                target,
                self.p,
                self.max_iter,
                self.overshoot,
                "step",
                self.candidates,
                logits=logits if same else None,
                source=source if same and wide.dtype == x.dtype else None,
                whole_batch=held.draws,
                together=not convolves(model),
                backend=self.backend,
            )
            result = found.result
            correct = found.prediction == target
            scale = self._norm(wide) if self.normalize else None
            distance = result.distance if scale is None else result.distance / scale
            selected = self._selected(distance, correct, result.success, target, logits.shape[1])
            rows = self._rows(selected, logits.shape[1], held.draws)
            terms = self._terms(held, wide, found, target, scale, rows)
        share = torch.where(selected[rows], terms, 0).sum() * (self.weight / max(len(x), 1))
        loss = nll.mean() + share
        return AdversarialMargins(
            loss, nll.detach(), distance, result.success, correct, selected, result.iterations, result.label
        )

    def _norm(self, x: Tensor) -> Tensor:
        """||x[n]||_p, [N]."""
        return functional.dual_norm([x], dual_exponent(self.p), batch_dims=1, backend=self.backend)[:, 0]

    def _selected(self, m: Tensor, correct: Tensor, success: Tensor, target: Tensor, classes: int) -> Tensor:
        """Which samples take part, [N] bool."""
        if self.aggregation == "avg":
            return success
        kept = max(1, int(MIN_SHARE * len(m)))
        nearest = _first_of_each_class(m, correct & success, target, classes, kept)
        return nearest | _first_of_each_class(-m, ~correct & success, target, classes, kept)

    def _rows(self, selected: Tensor, classes: int, draws: bool) -> Tensor:
        """Indices [S] of samples that are repeated with a graph: all selected ones, and others where to leave them out
        would mean to wait for the device, or to draw other dropout masks."""
        everyone = torch.arange(len(selected), device=selected.device)
        if draws:
            return everyone
        if host_sees(selected):
            return everyone[selected]
        if self.aggregation == "avg":
            return everyone
        slots = 2 * min(classes, max(1, int(MIN_SHARE * len(selected))))
        return selected.float().topk(min(slots, len(selected))).indices

    def _terms(
        self, held: _Held, x: Tensor, found: Search, target: Tensor, scale: Tensor | None, rows: Tensor
    ) -> Tensor:
        """shrink(-c m) or shrink(d m) of samples rows [S], with a graph."""
        correct = (found.prediction == target)[rows]
        if len(rows) == 0 or len(found.upper) == 0:
            return x.new_zeros(len(rows))
        measure = self._envelope if self.gradient == "envelope" else self._unrolled
        m = measure(held, x, found, target, rows)
        if scale is not None:
            m = m / scale[rows]
        return self._shrink(torch.where(correct, -self.c * m, self.d * m), correct)

    def _shrink(self, t: Tensor, correct: Tensor) -> Tensor:
        if self.shrinkage == "lin":
            return t.clamp_max(TERM_LIMIT)
        if self.shrinkage == "inv":
            return 1 / (1 - t.clamp_max(1 - 1 / TERM_LIMIT))
        limit = math.log(TERM_LIMIT / self.weight + 1) if self.weight > 0 else math.inf
        return torch.where(correct, t, t.clamp_max(limit)).exp().clamp_max(TERM_LIMIT)

    def _unrolled(self, held: _Held, x: Tensor, found: Search, target: Tensor, rows: Tensor) -> Tensor:
        """||Delta||_p [S], the steps of the search repeated with a graph toward the boundaries that it chose."""
        x, iterations = x[rows], found.result.iterations[rows]
        leaving = host_sees(x) and not held.draws
        delta = torch.zeros_like(x)
        everyone = torch.arange(len(rows), device=rows.device)
        for i in range(len(found.upper)):
            active = iterations > i
            moving = everyone[active] if leaving else everyone
            if len(moving) == 0:
                break
            point = x[moving] + delta[moving]
            if not point.requires_grad:
                point.requires_grad_()
            upper, lower = found.upper[i, rows[moving]], found.lower[i, rows[moving]]
            logits = held(point)
            gap = _difference(logits, upper, lower)
            w = pair_gradient(logits, upper, lower, point, second_order=self.gradient == "unrolled")
            step = functional.deepfool_step(gap.unsqueeze(1), w.unsqueeze(1), active[moving], self.p, self.backend).step
            delta = delta.index_add(0, moving, (1 + self.overshoot) * step)
        return self._norm(delta)

    def _envelope(self, held: _Held, x: Tensor, found: Search, target: Tensor, rows: Tensor) -> Tensor:
        """||Delta||_p [S] with the gradient (g - const) / ||grad_x g||_q at x + Delta, g = z_upper - z_lower > 0 on the
        side of x."""
        result, target = found.result, target[rows]
        point = (x[rows] + result.perturbation[rows]).requires_grad_()
        last = (result.iterations[rows] - 1).clamp_min(0)
        # T leaves its class for the one predicted at x*; F enters the target from the class predicted before.
        correct = found.prediction[rows] == target
        before = torch.where(correct, target, found.lower[last, rows])
        after = torch.where(correct, result.label[rows], target)
        logits = held(point)
        g = _difference(logits, before, after)
        w = pair_gradient(logits, before, after, point)
        slope = functional.dual_norm([w], self.p, batch_dims=1, backend=self.backend)[:, 0]
        change = (g - g.detach()) / torch.where(slope == 0, math.inf, slope)
        return self._norm(result.perturbation[rows]) + change

    def extra_repr(self) -> str:
        parts = [f"weight={self.weight:g}", f"c={self.c:g}", f"d={self.d:g}", f"aggregation={self.aggregation!r}"]
        parts += [f"shrinkage={self.shrinkage!r}", f"normalize={self.normalize}", f"max_iter={self.max_iter}"]
        parts += [f"overshoot={self.overshoot:g}", f"candidates={self.candidates}", f"gradient={self.gradient!r}"]
        return ", ".join([*parts, f"p={self.p:g}"])


class _Held:
    """The model as a fixed function of its input: every call draws the random numbers of one forward pass again."""

    def __init__(self, model: nn.Module, x: Tensor, random: RandomState | None) -> None:
        self.model, self.dtype = model, x.dtype
        self.random = RandomState.now(x) if random is None else random
        if random is None and any(module.training for module in model.modules()):
            with self.random.replayed(), torch.no_grad():
                model(x)
                self.draws = self.random.changed()
        else:
            # The forward pass that gave the logits has just been.
            self.draws = self.random.changed()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if not self.draws:
            return self.model(x)
        with self.random.replayed():
            return self.model(x)


def _difference(logits: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """z_upper - z_lower, [S], in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (z.gather(1, upper.unsqueeze(1)) - z.gather(1, lower.unsqueeze(1))).squeeze(1)


def _first_of_each_class(value: Tensor, among: Tensor, target: Tensor, classes: int, kept: int) -> Tensor:
    """[N] bool: for each class the sample with the smallest value, if it is one of the `kept` smallest; of samples
    `among` alone, equal values in the order of the batch."""
    rank = torch.empty_like(target)
    order = torch.where(among, value, math.inf).sort(stable=True).indices
    rank[order] = torch.arange(len(target), device=target.device)
    first = torch.full((classes,), len(target), device=target.device)
    first = first.scatter_reduce(0, target, torch.where(among, rank, len(target)), "amin")
    return among & (rank < kept) & (rank == first[target])


def _description(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
