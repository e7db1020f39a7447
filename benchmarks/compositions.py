"""What the ops are measured against: the same quantities composed of PyTorch's own operations."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from margin_kernels.reference.dual_norm import dual_exponent


def masked_topk(logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """index, gap and mean cross-entropy as one would write them: cross_entropy, a masked topk, two gathers."""
    loss = cross_entropy(logits, target)
    label = target.unsqueeze(1)
    index = logits.detach().scatter(1, label, -math.inf).topk(k, dim=1).indices
    return index, logits.gather(1, index) - logits.gather(1, label), loss


def vector_norms(gradients: list[Tensor], p: float) -> Tensor:
    """[N, L]: one torch.linalg.vector_norm per layer."""
    q = dual_exponent(p)
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    return torch.stack([torch.linalg.vector_norm(g.flatten(1), q, dim=1, dtype=wide) for g in gradients], 1)


def hinge(gap: Tensor, norm: Tensor, gamma: float, eps: float = 1e-6) -> Tensor:
    """mean over layers of max_j max(gamma - d, 0), [N]."""
    distance = -gap.unsqueeze(-1) / (eps + norm)
    return (gamma - distance).clamp(min=0).amax(dim=1).mean(dim=1)


def row_differences(rows: Tensor, index: Tensor, target: Tensor, p: float) -> Tensor:
    """[N, k]: norms of the materialised differences of gathered rows."""
    differences = rows[index] - rows[target].unsqueeze(1)
    return vector_norms([differences.flatten(0, 1)], p).view(index.shape)


def one_to_n_pairs(logits: Tensor, target: Tensor, delta: float) -> Tensor:
    """The mean of -log of the paper's eq. 8 as printed: an N x N table of negatives, bounds as hinges."""
    own = torch.exp(delta - (delta - logits.gather(1, target.unsqueeze(1)).squeeze(1)).relu())
    pairs = torch.exp(-delta + (delta + logits[:, target].t()).relu())  # [i, j]: sample j in the column of y_i
    others = target.unsqueeze(1) != target.unsqueeze(0)
    return -torch.log(own / (own + (pairs * others).sum(1))).mean()


def nearest_boundary(gap: Tensor, gradients: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """step [N, D] and distance [N] of one DeepFool step for p = 2 or inf: norms, argmin, gather, scale."""
    norms = torch.linalg.vector_norm(gradients, dual_exponent(p), dim=2)
    distance, choice = (gap.abs() / norms).min(dim=1)
    sample = torch.arange(len(gap), device=gap.device)
    w = gradients[sample, choice]
    slope = w.sign() if math.isinf(p) else w / norms[sample, choice].unsqueeze(1)
    return distance.unsqueeze(1) * slope, distance
