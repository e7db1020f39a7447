"""
index = the k largest logits[n, i] with i != target[n], decreasing, equal logits: lowest class first   [N, k] int64
gap   = logits[n, index] - logits[n, target]                                                            [N, k]
nll   = logsumexp_i logits[n, i] - logits[n, target]                                                    [N]

A row with a non-finite logit, or a target outside [0, C), has gap = nll = NaN and a NaN gradient. Its index then means
nothing; it holds the first k classes other than the target, so that a gather stays legal.
"""

import torch
from torch import Tensor


def competitors(logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    classes = logits.shape[1]
    z = logits if logits.dtype == torch.float64 else logits.float()
    valid = (target >= 0) & (target < classes)
    y = torch.where(valid, target, 0).unsqueeze(1)
    usable = valid & torch.isfinite(z).all(dim=1)

    with torch.no_grad():
        # The label leaves by its place in the order, not by a value: no finite logit is low enough to mask with.
        # Rows with a non-finite logit all sort as zeros, so they get the first k classes other than the label.
        order = torch.sort(torch.where(usable.unsqueeze(1), z, 0.0), dim=1, descending=True, stable=True).indices
        label_last = torch.sort((order == y).to(torch.uint8), dim=1, stable=True).indices
        index = order.gather(1, label_last[:, :k])

    # A factor, not a mask: the gradient of an unusable row is NaN as well, in every entry.
    z = z * torch.where(usable, 1.0, float("nan")).to(z.dtype).unsqueeze(1)
    z_label = z.gather(1, y)
    # log_softmax subtracts the largest logit before anything is rounded away.
    nll = -torch.log_softmax(z, dim=1).gather(1, y).squeeze(1)
    return index, z.gather(1, index) - z_label, nll
