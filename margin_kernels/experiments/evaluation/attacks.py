"""White-box l_inf attacks on a batch: FGSM, IFGSM, PGD, on cross-entropy or on the logit gap.

    FGSM    x' = clip(x + eps sign(grad_x J(x)))
    IFGSM   x <- clip(project(x + alpha sign(grad_x J(x)))), steps >= eps/alpha times; project: onto |x - x_0| <= eps
    PGD     IFGSM from a uniform start in the eps ball

    J = "ce":   -phi = logsumexp_{j != y} z_j - z_y            J = "gap":   max_{j != y} z_j - z_y

phi is the log-odds of the label. Cross-entropy is nll = softplus(-phi), so grad_x nll = (1 - p_y) grad_x(-phi): for
each sample the two gradients have one direction and one sign. A margin loss may scale the logits up until p_y rounds to
1 in fp32, from 1 - p_y < 6e-8 on. The gradient of nll then loses the label's part, which turns it, and further on all
of it: the attack stands still although the decision regions are as they were. The gradient of phi keeps its size. Each
attack reports the share of samples with 1 - p_y < 6e-8, and the share whose own attack gradient is zero everywhere at
the first step. The model is in eval mode during an attack and in its own modes afterwards; its parameters receive no
gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels.modes import eval_mode

OBJECTIVES = ("ce", "gap")
# Below this 1 - p_y, p_y rounds to 1 in float32 and its entry of softmax - e_y to 0.
SATURATED = 6e-8


@dataclass(frozen=True)
class Attack:
    """Adversarial images [N, *]; of the samples at the start of the attack the share whose attack gradient is zero
    everywhere, and the share with 1 - p_y < 6e-8."""

    images: Tensor
    zero_gradient: float
    saturated: float


def logit_gap(logits: Tensor, target: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y per sample: logits [N, C], target [N] -> [N]; positive where misclassified."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = logits.gather(1, target[:, None])
    others = logits.masked_fill(F.one_hot(target, logits.shape[1]).bool(), -math.inf)
    return others.amax(1) - own[:, 0]


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """phi = z_y - logsumexp_{j != y} z_j per sample: logits [N, C], target [N] -> [N], in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    others = logits.masked_fill(F.one_hot(target, logits.shape[1]).bool(), -math.inf)
    return logits.gather(1, target[:, None])[:, 0] - others.logsumexp(1)


def attack_gradient(model: nn.Module, x: Tensor, target: Tensor, objective: str) -> tuple[Tensor, Tensor]:
    """grad_x of the summed objective, [N, *], and the logits [N, C] at x; no parameter is touched."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logits = model(leaf)
        value = -log_odds(logits, target) if objective == "ce" else logit_gap(logits, target)
        return torch.autograd.grad(value.sum(), leaf)[0], logits.detach()


def fgsm(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    eps: float,
    objective: str = "ce",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """One step of size eps: x [N, *] within bounds, target [N] -> Attack."""
    return ifgsm(model, x, target, eps, alpha=eps, steps=1, objective=objective, bounds=bounds)


def ifgsm(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    objective: str = "ce",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """`steps` steps of size `alpha` (default: 2 eps / steps, so that the ball's surface is within reach), projected
    and clipped.

    Raises ValueError where steps * alpha < eps: the attack could not even reach the surface of the ball it is judged
    by.
    """
    return _iterate(model, x, x, target, eps, alpha, steps, objective, bounds)


def pgd(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    objective: str = "gap",
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Attack:
    """IFGSM from a start drawn uniformly in the eps ball around x."""
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * (2 * eps) - eps
    start = (x + noise).clamp(*bounds)
    return _iterate(model, x, start, target, eps, alpha, steps, objective, bounds)


def _iterate(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    target: Tensor,
    eps: float,
    alpha: float | None,
    steps: int,
    objective: str,
    bounds: tuple[float, float],
) -> Attack:
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    size = 2 * eps / steps if alpha is None else alpha
    if steps * size < eps * (1 - 1e-6):
        raise ValueError(
            f"steps * alpha is {steps} * {size:g} = {steps * size:g}, less than eps = {eps:g}: the ball is out of reach"
        )
    zero = saturated = torch.zeros((), device=x.device)
    with eval_mode(model):
        current = start.detach()
        for step in range(steps):
            gradient, logits = attack_gradient(model, current, target, objective)
            if step == 0 and len(x):
                zero = (gradient.flatten(1) == 0).all(1).float().mean()
                saturated = (torch.sigmoid(-log_odds(logits, target)) < SATURATED).float().mean()
            moved = current + size * gradient.sign()
            current = (x + (moved - x).clamp(-eps, eps)).clamp(*bounds)
    return Attack(current, float(zero), float(saturated))
