"""A thousand steps of every loss and mode hold no more memory than a thousand before them. `make test` takes a hundred,
`make nightly` all."""

import gc
import os

import pytest
import torch
from torch import nn

import margin_kernels as mk

STEPS = 1000 if os.environ.get("MARGIN_KERNELS_NIGHTLY") == "1" else 100
LARGEST = 1 << 20  # bytes
CASES = {
    "large margin, loop": (lambda: mk.LargeMarginLoss(), "loop"),
    "large margin, split": (lambda: mk.LargeMarginLoss(top_k=1), "split"),
    "large margin, soft": (lambda: mk.LargeMarginLoss(top_k=1, competitors="soft"), "split"),
    "large margin, pairwise": (lambda: mk.LargeMarginLoss(top_k=1, auxiliary="pairwise"), "split"),
    "large margin, probabilities": (lambda: mk.LargeMarginLoss(space="probability"), "loop"),
    "large margin, auto": (lambda: mk.LargeMarginLoss(top_k=1), "auto"),
    "large margin, second order": (lambda: mk.LargeMarginLoss(second_order=True), "loop"),
    "large margin, tangent": (lambda: mk.LargeMarginLoss(top_k=1, second_order=True), "split"),
    "sensitivity": (lambda: mk.MarginSensitivityLoss(), "auto"),
    "sensitivity, tangent": (lambda: mk.MarginSensitivityLoss(top_k=1), "split"),
    "adversarial, unrolled": (lambda: mk.AdversarialMarginLoss(max_iter=2), "auto"),
    "adversarial, envelope": (lambda: mk.AdversarialMarginLoss(max_iter=2, gradient="envelope"), "auto"),
    "adversarial, first order": (lambda: mk.AdversarialMarginLoss(max_iter=2, gradient="first_order"), "auto"),
    "1-to-N": (lambda: mk.OneToNLoss(), "auto"),
}


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("case", CASES)
def test_a_thousand_steps_hold_no_more_than_a_few(case):
    make, passes = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    loss = make()
    layers = ("input", "1") if isinstance(loss, mk.LargeMarginLoss) else None
    task = mk.MarginTask(model, loss, layers, passes if loss.needs == "taps" else "auto")
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    x, y = torch.rand(32, 6), torch.randint(5, (32,))

    def train(steps: int) -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            task(x, y)["loss"].backward()
            optimiser.step()
        gc.collect()

    train(STEPS)  # arenas of the allocator
    before = resident()
    train(STEPS)
    grown = resident() - before
    assert grown <= LARGEST, f"{grown / 2**20:.2f} MiB"
