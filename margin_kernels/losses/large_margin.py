"""Large margin loss: min( max(gamma_l - d[n,j,l], 0), cap_l ),   d[n,j,l] = -gap[n,j] / (eps + D[n,j,l])."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional, taps
from ..backends import BACKENDS
from ..passes import difference_norms, split_taps
from ..reference.margin_hinge import AGGREGATIONS
from ..split_backward import Kind, NotExact, Split, split_or_loop
from ..tangent import TangentSplit
from ..taps import Captured, cut_sources
from .options import REDUCTIONS, RIVALS, choice, count, flag, is_number, norm_exponent, number, numbers

SPACES = ("logit", "probability")
LAYER_SCALES = (None, "numel")
LAYER_REDUCTIONS = ("mean", "sum")
AUXILIARIES = ("cross_entropy", "pairwise")
# Competitors up to which "auto" takes the split backward: it keeps the activation gradients of every pass, and from
# three on writing and reading them costs what it saves (CPU, mnist_cnn and mlp800: even at 3, slower at 9).
SPLIT_UP_TO = 2


class Margins(NamedTuple):
    """What one evaluation of LargeMarginLoss shows; everything but `loss` is detached.

    loss [] or [N];  nll [N];  gap, index [N,k];  norm D, distance d, active 1[0 < gamma - d < cap] (bool) [N,k,L]
    """

    loss: Tensor
    nll: Tensor
    gap: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is a method
    norm: Tensor
    distance: Tensor
    active: Tensor


class LargeMarginLoss(nn.Module):
    """Large margin loss: hinge on the linearised distance of the sample, at every tap, to the decision boundaries.

        gap[n,j]    = s[n,i] - s[n,y_n]      i = j-th of the top_k logits without the label; s = logits or softmax
        D[n,j,l]    = || d gap[n,j] / d h_l[n] ||_q            q = p / (p - 1)
        d[n,j,l]    = - gap[n,j] / (eps + D[n,j,l])            distance in the p-norm, positive on the right side
        term[n,j,l] = min( max(gamma_l - d, 0), alpha gamma_l )
        loss[n]     = sum_l w_l agg_j term[n,j,l] / sum_l w_l
        total       = margin_weight * loss + cross_entropy_weight * (nll or log(1 + exp(z_best - z_y)))

    Args:
        gamma: margin that is asked for, > 0, in the units of the activations; one number or one for each layer.
        p: norm of the distances, in [1, inf]; float("inf") or "inf".
        top_k: competitors k, 1 <= k <= C - 1. The passes cost k activation-only backward passes.
        aggregation: over competitors, "max", "sum", "mean", or "mean_distance" (one term of the mean distance).
        alpha: the terms are clipped at alpha * gamma, > 0; None: no clip.
        eps: added to D, >= 0.
        layer_weights: None or one weight >= 0 for each layer.
        layer_scale: None, or "numel": D is divided by the number of elements of the layer's activation.
        space: scores s, "logit" or "probability". Probability distances grow like sinh(gap): gamma must be far larger.
        second_order: False: D is a constant in the backward pass (the paper); True: D is differentiated as well, for
            which every layer must be twice differentiable (attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH)).
        margin_weight, cross_entropy_weight: finite, >= 0.
        auxiliary: what cross_entropy_weight weighs: "cross_entropy", or "pairwise", the logistic loss of the label and
            its best competitor, for which the split backward (`passes` of MarginTask) needs no pass of its own.
        layer_reduction: "mean" (weighted) or "sum" (of w_l term) over layers.
        reduction: "mean", "sum" or "none" over samples, of the margin loss and the cross-entropy alike.
        backend: "auto" or a backend of margin_kernels.backends, for all ops.

    Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed.

    Source: Elsayed, Krishnan, Mobahi, Regan, Bengio. Large Margin Deep Networks for Classification. NeurIPS 2018.
    """

    # What MarginTask gives it: the taps of one forward pass.
    needs = "taps"

    def __init__(
        self,
        gamma: float | Sequence[float] = 1.0,
        p: float | str = 2,
        top_k: int = 1,
        aggregation: str = "max",
        alpha: float | None = None,
        eps: float = 1e-6,
        layer_weights: Sequence[float] | None = None,
        layer_scale: str | None = None,
        space: str = "logit",
        second_order: bool = False,
        margin_weight: float = 1.0,
        cross_entropy_weight: float = 0.0,
        auxiliary: str = "cross_entropy",
        layer_reduction: str = "mean",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.gamma = number("gamma", gamma, above=0) if is_number(gamma) else numbers("gamma", gamma, above=0)
        self.p = norm_exponent(p)
        self.top_k = count("top_k", top_k, RIVALS)
        self.aggregation = choice("aggregation", aggregation, AGGREGATIONS)
        self.alpha = None if alpha is None else number("alpha", alpha, above=0)
        self.eps = number("eps", eps, least=0)
        self.layer_weights = None if layer_weights is None else numbers("layer_weights", layer_weights, least=0)
        if self.layer_weights is not None and sum(self.layer_weights) == 0:
            raise ValueError(f"layer_weights must not all be 0, got {layer_weights}")
        self.layer_scale = choice("layer_scale", layer_scale, LAYER_SCALES)
        self.space = choice("space", space, SPACES)
        self.second_order = flag("second_order", second_order)
        self.margin_weight = number("margin_weight", margin_weight, least=0)
        self.cross_entropy_weight = number("cross_entropy_weight", cross_entropy_weight, least=0)
        self.auxiliary = choice("auxiliary", auxiliary, AUXILIARIES)
        self.layer_reduction = choice("layer_reduction", layer_reduction, LAYER_REDUCTIONS)
        self.reduction = choice("reduction", reduction, REDUCTIONS)
        self.backend = choice("backend", backend, ("auto", *BACKENDS))
        # Hyper-parameters as tensors [L] on a device, made once: no buffers, which .half() would round.
        self._constants: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._tried: dict[Kind, str | None] = {}

    def forward(self, logits: Tensor, target: Tensor, activations: Sequence[Tensor]) -> Tensor:
        """The loss, [] or [N], of logits [N,C] and target [N] int64 with activations h_l [N,*] from the same forward.

        The activations must require grad and lie in the graph of the logits; the logits themselves may be one of them.
        """
        return self.margins(logits, target, taps.explicit(logits, activations)).loss

    def margins(self, logits: Tensor, target: Tensor, captured: Captured, passes: str = "loop") -> Margins:
        """The loss and all that it measured on the way.

        logits    [N,C], from which gap and cross-entropy are taken
        target    [N] int64, values in [0, C)
        captured  the forward pass whose taps are measured; its logits may differ from `logits` (frozen batch norm)
        passes    "loop": the loss is differentiated through the logits. "split": the gradients of the parameters come
                  from those of the passes (margin_kernels.split_backward), the loss has parameters as its inputs and
                  not the logits. "auto": split where it is exact, for up to two competitors
        Raises ValueError where passes is "split" and cannot be.
        """
        if passes == "auto" and self.top_k > SPLIT_UP_TO:
            passes = "loop"
        return split_or_loop(
            passes, partial(self._split, logits, captured), partial(self._margins, logits, target, captured)
        )

    def _margins(self, logits: Tensor, target: Tensor, captured: Captured, split: Split | None) -> Margins:
        source = logits if split is None else logits.detach().requires_grad_()
        index, gap, nll = self.gaps(source, target)
        # On a GPU a target outside [0, C) makes gap and nll NaN; clamped, it is also safe to index with.
        label = target.clamp(0, logits.shape[1] - 1)
        norm = difference_norms(
            captured, label, index, self.p, self.space, self.layer_scale, self.second_order, split, self.backend
        )
        gamma, cap, layer_weights = self._per_layer(norm)
        loss, distance = functional.margin_hinge_with_distance(
            gap,
            norm,
            gamma,
            cap,
            self.eps,
            self.aggregation,
            self.layer_reduction,
            self.reduction,
            layer_weights,
            self.backend,
        )
        shortfall = gamma - distance
        active = shortfall > 0 if cap is None else (shortfall > 0) & (shortfall < cap)
        total = self._total(loss, nll, source, label, index)
        if split is None:
            cut_sources(total, captured)
        else:
            total = split.loss(total, source, gap if self.space == "probability" else None, index, label)
        return Margins(total, nll.detach(), gap.detach(), index, norm.detach(), distance, active)

    def _split(self, logits: Tensor, captured: Captured) -> Split:
        """The split backward of this loss. Raises NotExact with the reason where there is none."""
        passed = split_taps(captured, logits, self.space, self.p)
        if self.second_order and (self.top_k > 1 or self.space == "probability"):
            raise NotExact('second_order=True takes it for top_k=1 and space="logit" only')
        every = self.space == "logit" and self.top_k >= logits.shape[1] - 1
        if self.cross_entropy_weight > 0 and self.auxiliary == "cross_entropy" and not every:
            raise NotExact(
                "the gradient of the cross-entropy is not among those of the passes: take cross_entropy_weight=0, "
                'auxiliary="pairwise", or all competitors of space="logit"'
            )
        if self.cross_entropy_weight > 0 and self.space == "probability":
            raise NotExact('the passes of space="probability" do not hold the gradient of the pairwise logistic loss')
        return (TangentSplit if self.second_order else Split)(captured, passed, self._tried)

    def logit_statistics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the logits alone show, detached: gap, index [N,k] and nll [N]."""
        index, gap, nll = self.gaps(logits, target)
        return {"nll": nll, "gap": gap, "index": index}

    def gaps(self, logits: Tensor, target: Tensor) -> functional.Competitors:
        """index [N,k], gap [N,k] in the loss's space and nll [N] of logits [N,C]: all that needs no activations."""
        index, gap, nll = functional.competitors(logits, target, self.top_k, backend=self.backend)
        if self.space == "probability":
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            scores = torch.softmax(logits, 1, dtype=wide)
            label = target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
            gap = scores.gather(1, index) - scores.gather(1, label)
        return functional.Competitors(index, gap, nll)

    def _total(self, loss: Tensor, nll: Tensor, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        if self.margin_weight != 1:
            loss = loss * self.margin_weight
        if self.cross_entropy_weight == 0:
            return loss
        if self.auxiliary == "pairwise":
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            best, own = wide.gather(1, index[:, :1]), wide.gather(1, label.unsqueeze(1))
            nll = F.softplus(best - own).squeeze(1)
        nll = functional.reduced(nll, self.reduction)
        return loss + (nll if self.cross_entropy_weight == 1 else nll * self.cross_entropy_weight)

    def _per_layer(self, norm: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """gamma, cap and layer weights, each [L] or None, in the dtype and on the device of norm [N,k,L]."""
        layers = norm.shape[2]
        key = (norm.device, norm.dtype, layers)
        if key not in self._constants:
            gamma = torch.tensor(self._spread("gamma", self.gamma, layers), dtype=norm.dtype)
            cap = None if self.alpha is None else (self.alpha * gamma).to(norm.device)
            weights = None
            if self.layer_weights is not None:
                spread = self._spread("layer_weights", self.layer_weights, layers)
                weights = torch.tensor(spread, dtype=norm.dtype, device=norm.device)
            self._constants[key] = gamma.to(norm.device), cap, weights
        return self._constants[key]

    @staticmethod
    def _spread(name: str, value: float | list[float], layers: int) -> list[float]:
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers:
            raise ValueError(f"{name} must be one number or one for each of the {layers} taps, got {len(values)}")
        return values

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors made for a device, which another machine may not have."""
        return {**self.__dict__, "_constants": {}, "_tried": {}}

    def extra_repr(self) -> str:
        parts = [f"gamma={self.gamma}", f"p={self.p:g}", f"top_k={self.top_k}", f"aggregation={self.aggregation!r}"]
        defaults = {
            "alpha": None,
            "eps": 1e-6,
            "layer_weights": None,
            "layer_scale": None,
            "space": "logit",
            "second_order": False,
            "margin_weight": 1.0,
            "cross_entropy_weight": 0.0,
            "auxiliary": "cross_entropy",
            "layer_reduction": "mean",
            "reduction": "mean",
            "backend": "auto",
        }
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts)
