"""
a[i]      = min(z[i, y_i], delta)                                                   slope 1 where z < delta, else 0
b[j, c]   = max(z[j, c], -delta)                                                    slope 1 where z > -delta, else 0
column[c] = A_c = logsumexp over j with y_j != c of b[j, c]   (+ delta for bound = "positive")                  [C]
loss[i]   = softplus(A_{y_i} - a_i),   with cross_entropy logaddexp(A_{y_i}, logsumexp_k z[i, k]) - a_i         [N]

z [N, C], y [N]. Where no sample has y_j != c, A_c = -inf: the loss is 0, with cross_entropy logsumexp_k z[i, k] - a_i.
A logit of +inf counts as NaN, in every loss that it enters. -inf is a masked class: b = -delta, and a label that is
masked has loss infinity and slope -s. A target outside [0, C) makes its whole row NaN: whose
negatives it holds is unknown.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_INF = float("inf")
BOUNDS = ("symmetric", "positive")


def logsumexp(b: Tensor) -> Tensor:
    """Over the first dimension, -inf with gradient 0 where all are -inf: exp(-inf - -inf) would make it NaN."""
    nothing = (b == float("-inf")).all(0)
    return torch.where(nothing, float("-inf"), torch.logsumexp(torch.where(nothing, 0.0, b), dim=0))


def one_to_n(
    logits: Tensor,
    target: Tensor,
    delta: float,
    bound: str,
    cross_entropy: bool,
    joined: Callable[[Tensor], Tensor] = lambda column: column,
    counted: Tensor | None = None,
) -> Tensor:
    """`joined`: makes of the log-sum-exp over this batch's negatives, [C], -inf where there are none, that over all.
    `counted` [N] bool: rows where it is False have loss 0 and are nobody's negatives."""
    classes = logits.shape[1]
    z = logits if logits.dtype == torch.float64 else logits.float()
    y = target.unsqueeze(1)
    if counted is not None:
        z, y = torch.where(counted.unsqueeze(1), z, 0.0), torch.where(counted.unsqueeze(1), y, 0)
    valid = (y >= 0) & (y < classes)
    # A factor, not a mask: the gradient of what is not finite is NaN as well.
    z = z * torch.where((z.detach() < float("inf")) & valid, 1.0, float("nan")).to(z.dtype)
    y = torch.where(valid, y, 0)

    own = (torch.arange(classes, device=z.device) == y) & valid
    # NaN is neither above nor below: it passes through both masks.
    b = torch.where(z <= -delta, -delta, z).masked_fill(own, float("-inf"))
    if counted is not None:
        b = b.masked_fill(~counted.unsqueeze(1), float("-inf"))
    column = joined(logsumexp(b))
    has_negatives = column != float("-inf")
    column = torch.where(has_negatives, column, 0.0)
    if bound == "positive":
        column = column + delta

    z_label = z.gather(1, y).squeeze(1)
    a = torch.where(z_label >= delta, delta, z_label)
    y = y.squeeze(1)
    against = column[y]
    positive = logsumexp(z.t()) if cross_entropy else a
    # logaddexp(A, l) = l + softplus(A - l). softplus = -logsigmoid(-x): exact, and finite derivatives of every order.
    term = -logsigmoid(torch.where(has_negatives[y], positive - against, 0.0))
    term = torch.where(has_negatives[y], term, 0.0)
    if not cross_entropy:
        return term if counted is None else torch.where(counted, term, 0.0)
    # Every class of a row masked: logaddexp(A, -inf) = A.
    masked = positive.detach() == float("-inf")
    rest = torch.where(masked, 0.0, term) + torch.where(masked, torch.where(has_negatives[y], against, -_INF), positive)
    loss = rest - a
    return loss if counted is None else torch.where(counted, loss, 0.0)
