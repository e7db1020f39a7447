"""
index   = the k largest logits[n, i] with i != y[n], decreasing, equal logits: lowest class first       [N, k] int64
gap     = z[n, index] - z[n, y[n]]                                                                      [N, k]
phi     = z[n, y[n]] - logsumexp_{i != y[n]} z[n, i]                                                    [N]
nll     = logsumexp_i z[n, i] - z[n, y[n]] = log1p(sum_{i != y[n]} exp(z[n, i] - z[n, y[n]]))            [N]
uniform = mean over the finite classes i of logsumexp z[n] - z[n, i]                                    [N]

The sum behind phi leaves the label out, so that nothing small is rounded away beside 1 (csrc/math/competitors.h).
A class with logit -inf is masked. What every kind of row gets stands in `functional.competitors`. Masked entries are
replaced before they are computed with, so that no derivative is 0 * inf.
"""

import torch
from torch import Tensor

_INF = float("inf")


def competitors(
    logits: Tensor, target: Tensor, k: int, ignore_index: int = -100, uniform: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    classes = logits.shape[1]
    z = logits if logits.dtype == torch.float64 else logits.float()
    ignored = target == ignore_index
    labelled = (target >= 0) & (target < classes) & ~ignored
    y = torch.where(labelled, target, 0).unsqueeze(1)
    is_label = torch.arange(classes, device=z.device) == y
    masked = z.detach() == -_INF
    # NaN compares false. A row without any finite logit has no softmax.
    usable = labelled & (z.detach() < _INF).all(dim=1) & ~masked.all(dim=1)
    no_other = usable & (masked | is_label).all(dim=1)
    label_masked = masked.gather(1, y).squeeze(1)

    with torch.no_grad():
        # The label leaves by its place in the order, not by a value. Rows that are not usable sort as zeros.
        order = torch.sort(torch.where(usable.unsqueeze(1), z, 0.0), dim=1, descending=True, stable=True).indices
        leaves = (order == y) & ~ignored.unsqueeze(1)
        index = order.gather(1, torch.sort(leaves.to(torch.uint8), dim=1, stable=True).indices[:, :k])

    # A factor, not a mask: the gradient of an unusable row is NaN as well, in every entry. An ignored row has none.
    z = torch.where(ignored.unsqueeze(1), 0.0, z)
    z = z * torch.where(usable | ignored, 1.0, float("nan")).to(z.dtype).unsqueeze(1)
    masked = masked & usable.unsqueeze(1)
    z_label = z.gather(1, y)

    z_others = torch.where((no_other | ignored).unsqueeze(1), 0.0, torch.where(is_label, -_INF, z))
    # No derivative runs through `largest`: phi and nll do not depend on it.
    largest = z_others.detach().amax(dim=1, keepdim=True)
    total = torch.exp(z_others - largest).sum(dim=1)
    lead = (z_label - largest).squeeze(1)
    phi = lead - torch.log(total)
    # Both branches run in every row, so each gets a number that it can work with.
    ahead = lead.detach() >= 0
    above, below = torch.where(ahead, lead, 0.0), torch.where(ahead, 0.0, lead)
    nll = torch.where(ahead, torch.log1p(total * torch.exp(-above)), torch.log(total + torch.exp(below)) - below)
    nll = torch.where(no_other | ignored, 0.0, nll)
    phi = torch.where(label_masked & usable, -_INF, phi)
    phi = torch.where(no_other, _INF, torch.where(ignored, 0.0, phi))

    z_index, other_masked = z.gather(1, index), masked.gather(1, index)
    finite_label = torch.where(label_masked.unsqueeze(1) & usable.unsqueeze(1), 0.0, z_label)
    gap = torch.where(other_masked, 0.0, z_index) - finite_label
    gap = torch.where((label_masked & usable).unsqueeze(1), _INF, gap)
    gap = torch.where(other_masked, -_INF, torch.where(ignored.unsqueeze(1), 0.0, gap))
    return gap, nll, phi, _uniform(z, masked, ignored) if uniform else None, index


def _uniform(z: Tensor, masked: Tensor, ignored: Tensor) -> Tensor:
    """The mean over the finite classes of -log p, [N]: from differences to the largest logit, which are >= 0."""
    top = z.detach().amax(dim=1, keepdim=True)
    below = torch.where(masked, 0.0, top - z).sum(dim=1) / (~masked).sum(dim=1)
    return torch.where(ignored, 0.0, below + torch.logsumexp(z - top, dim=1))
