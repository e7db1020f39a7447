"""A training loop of one's own: margins beside cross-entropy, a schedule, validation, a log, and a plain checkpoint.

    python examples/own_loop.py

Everything but the lines with `task` is what a loop with cross-entropy has.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import margin_kernels as mk

EPOCHS, BATCH = 12, 50


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10))


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)

    model = network()
    task = mk.MarginTask(model, mk.presets.standard(), layers=("input", "1", "4"))
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        task.train()
        for batch in torch.randperm(1300).split(BATCH):
            optimizer.zero_grad()
            out = task(images[batch], labels[batch])
            out["loss"].backward()
            optimizer.step()
        scheduler.step()
        task.eval()
        found = task.log(task.evaluate(images[1300:1500], labels[1300:1500]))  # every margin, no gradient left
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {float(value):.3f}" for name, value in found.items()))

    checkpoint = Path(tempfile.mkdtemp()) / "model.pt"
    torch.save(task.model.state_dict(), checkpoint)  # the keys of the plain model
    plain = network()
    plain.load_state_dict(torch.load(checkpoint))
    with torch.no_grad():
        wrong = (plain(images[1500:]).argmax(1) != labels[1500:]).double().mean()
    print(f"test error {100 * float(wrong):.1f}%")


if __name__ == "__main__":
    main()
