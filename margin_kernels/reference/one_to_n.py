"""
a[i]      = min(z[i, y_i], delta)                                                   slope 1 where z < delta, else 0
b[j, c]   = max(z[j, c], -delta)                                                    slope 1 where z > -delta, else 0
column[c] = A_c = logsumexp over j with y_j != c of b[j, c]   (+ delta for bound = "positive")                  [C]
loss[i]   = softplus(A_{y_i} - a_i),   with cross_entropy logaddexp(A_{y_i}, logsumexp_k z[i, k]) - a_i         [N]

z [N, C], y [N]. Where no sample has y_j != c, A_c = -inf: the loss is 0, with cross_entropy logsumexp_k z[i, k] - a_i.
A non-finite logit counts as NaN, in every loss that it enters. A target outside [0, C) makes its whole row NaN: whose
negatives it holds is unknown.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BOUNDS = ("symmetric", "positive")


def one_to_n(logits: Tensor, target: Tensor, delta: float, bound: str, cross_entropy: bool) -> Tensor:
    samples, classes = logits.shape
    z = logits if logits.dtype == torch.float64 else logits.float()
    y = target.unsqueeze(1)
    valid = (y >= 0) & (y < classes)
    # A factor, not a mask: the gradient of what is not finite is NaN as well.
    z = z * torch.where(torch.isfinite(z) & valid, 1.0, float("nan")).to(z.dtype)
    y = torch.where(valid, y, 0)

    own = (torch.arange(classes, device=z.device) == y) & valid
    has_negatives = own.sum(dim=0) < samples
    # NaN is neither above nor below: it passes through both masks.
    b = torch.where(z <= -delta, -delta, z).masked_fill(own, float("-inf"))
    # exp(-inf - -inf) would be NaN in the derivative of a column without negatives.
    column = torch.logsumexp(torch.where(has_negatives, b, 0.0), dim=0)
    if bound == "positive":
        column = column + delta

    z_label = z.gather(1, y).squeeze(1)
    a = torch.where(z_label >= delta, delta, z_label)
    y = y.squeeze(1)
    against = column[y]
    positive = torch.logsumexp(z, dim=1) if cross_entropy else a
    # logaddexp(A, l) = l + softplus(A - l). softplus = -logsigmoid(-x): exact, and finite derivatives of every order.
    term = -logsigmoid(torch.where(has_negatives[y], positive - against, 0.0))
    return torch.where(has_negatives[y], term, 0.0) + (positive - a if cross_entropy else 0.0)
