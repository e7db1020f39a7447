"""Every op on small and on odd shapes, forward and backward, as calls that test_gpu.py compares with the reference.

python tests/support/gpu_cases.py      runs all of them once on the compiled CUDA kernels, for compute-sanitizer
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from margin_kernels import functional


class Case(NamedTuple):
    """`run(leaves, backend)` returns differentiable outputs; the leaves are made on the default device."""

    op: str
    name: str
    leaves: list[Tensor]
    run: Callable[[list[Tensor], str], list[Tensor]]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers that are the same on every device."""
    numbers = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device()).to(dtype).requires_grad_()


def classes(n: int, count: int, *more: int, seed: int = 1) -> Tensor:
    numbers = torch.randint(0, count, (n, *more), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device())


def cases() -> Iterator[Case]:
    # Rows in a part of a warp, a warp, a block, several blocks; lengths that are no multiple of 16 bytes; k in and
    # beyond a list of 32, the longest of them C - 1.
    shapes = [
        (5, 7, 2),
        (3, 64, 1),
        (4, 1001, 5),
        (3, 5003, 3),
        (2, 70001, 4),
        (2, 130, 129),
        (3, 33, 32),
        (2, 3001, 40),
    ]
    for n, count, k in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield _competitors(n, count, k, dtype)
    for p in (1, 2, 3, 4, math.inf):
        for dtype in (torch.float32, torch.bfloat16):
            yield _dual_norm(p, dtype)
    for aggregation in ("max", "sum", "mean", "mean_distance"):
        yield _margin_hinge(aggregation)
    for p in (1, 2, 3, 4, math.inf):
        for features in (301, 5001):  # a pair in a warp, in a block
            yield _row_distance(p, features)
        for pixels in (663, 9001):  # a row in one part, in two
            yield _deepfool_step(p, pixels)
    for bound in ("symmetric", "positive"):
        for cross_entropy in (False, True):
            for n, count in [(67, 33), (5, 8200), (300, 10)]:  # one class and eight classes of a warp, long rows
                yield _one_to_n(n, count, bound, cross_entropy)


def _competitors(n: int, count: int, k: int, dtype: torch.dtype) -> Case:
    target = classes(n, count)

    def run(leaves: list[Tensor], backend: str) -> list[Tensor]:
        result = functional.competitors(leaves[0], target, k, uniform=True, backend=backend)
        return [result.gap, result.nll, result.phi, result.uniform]

    return Case("competitors", f"{n}x{count} k={k} {dtype}", [normal(n, count, dtype=dtype)], run)


def _dual_norm(p: float, dtype: torch.dtype) -> Case:
    shapes = [(3, 2, 5), (3, 2, 4, 9, 7), (3, 2, 5001), (3, 2, 70001)]  # a warp, a block, several parts
    leaves = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return Case("dual_norm", f"p={p} {dtype}", leaves, lambda g, backend: [functional.dual_norm(g, p, backend=backend)])


def _margin_hinge(aggregation: str) -> Case:
    gap, norm = normal(33, 3), (normal(33, 3, 5, seed=1).detach().abs() + 0.5).requires_grad_()

    def run(leaves: list[Tensor], backend: str) -> list[Tensor]:
        loss = functional.margin_hinge(
            *leaves, 1.0, cap=1.5, aggregation=aggregation, reduction="none", backend=backend
        )
        return [loss]

    return Case("margin_hinge", aggregation, [gap, norm], run)


def _row_distance(p: float, features: int) -> Case:
    target, index = classes(6, 50), classes(6, 50, 3, seed=2)

    def run(leaves: list[Tensor], backend: str) -> list[Tensor]:
        return [functional.row_distance(leaves[0], index, target, p, backend=backend)]

    return Case("row_distance", f"{features} p={p}", [normal(50, features)], run)


def _one_to_n(n: int, count: int, bound: str, cross_entropy: bool) -> Case:
    target = classes(n, count)

    def run(leaves: list[Tensor], backend: str) -> list[Tensor]:
        return [functional.one_to_n(leaves[0], target, 1.0, bound, cross_entropy, reduction="none", backend=backend)]

    return Case("one_to_n", f"{n}x{count} {bound} cross_entropy={cross_entropy}", [normal(n, count)], run)


def _deepfool_step(p: float, pixels: int) -> Case:
    active = torch.tensor([True, False, True, True])

    def run(leaves: list[Tensor], backend: str) -> list[Tensor]:
        result = functional.deepfool_step(leaves[0], leaves[1], active, p, backend=backend)
        return [result.step, result.distance]

    return Case("deepfool_step", f"{pixels} p={p}", [normal(4, 3), normal(4, 3, pixels, seed=1)], run)


def outputs_and_gradients(case: Case, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the case and the gradients of a fixed combination of them."""
    outputs = case.run(case.leaves, backend)
    weights = [normal(*o.shape, dtype=o.dtype, seed=7).detach() for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, case.leaves, weights))


def main() -> None:
    torch.set_default_device("cuda")
    count = 0
    for case in cases():
        outputs_and_gradients(case, "cuda")
        count += 1
    torch.cuda.synchronize()
    print(f"{count} cases ran")


if __name__ == "__main__":
    main()
