"""Settings by name, which need no tuning: LargeMarginLoss(gamma="auto") with terms that are bounded.

    task = MarginTask(model, presets.standard(), layers=("input", "layer1", "layer2"))
    task = MarginTask(model, presets.robust(), layers=("input",))

Every term counts gamma at most (alpha = 1), so that samples far on the wrong side are left to the cross-entropy, and is
divided by its gamma, so that no layer's units matter. What they reach: benchmarks/results/presets.
"""

from __future__ import annotations

from typing import Any

from .losses import LargeMarginLoss

SCALE_FREE = {"gamma": "auto", "alpha": 1.0, "cross_entropy_weight": 1.0}


def standard(**changes: Any) -> LargeMarginLoss:
    """Margin and cross-entropy at the price of cross-entropy: the soft competitor in first order, at hidden layers.

        loss = nll + mean over l of min( max(gamma_l - d_l, 0), gamma_l ) / gamma_l

    A sample counts as right, d > 0, where its label has a probability above 1 / (1 + sqrt(C - 1)): soft_shift = 1/2. A
    tap at the input raises accuracy under perturbations further, costs a part of a backward pass, and does harm where
    images are few.

    Args:
        changes: options of LargeMarginLoss in the place of these.
    """
    soft = {"soft_shift": 0.5} if changes.get("competitors", "soft") == "soft" else {}
    return LargeMarginLoss(**{**SCALE_FREE, "competitors": "soft", **soft, **changes})


def robust(**changes: Any) -> LargeMarginLoss:
    """For accuracy under small perturbations: the distance at the input, layers=("input",), in second order.

        loss = nll + 2 min( max(gamma - d, 0), gamma ) / gamma          gamma = 1.5 times the running median of d

    It costs more than twice the cross-entropy, and some of the clean accuracy where classes overlap. margin_weight=0.1
    with gamma_factor=1 gains less and costs less. p="inf" is the norm of attacks on every pixel.

    Args:
        changes: options of LargeMarginLoss in the place of these.
    """
    return LargeMarginLoss(**{**SCALE_FREE, "second_order": True, "margin_weight": 2.0, "gamma_factor": 1.5, **changes})
