"""The margins of every layer in an ordinary training with cross-entropy, for no pass of its own.

    python examples/margin_monitor.py

The gradients of the parameters stay what they are without the monitor, bit for bit.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import margin_kernels as mk


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    layers = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    monitor = mk.MarginMonitor(model, layers=("1", "4"))  # both ReLUs
    with monitor:
        for epoch in range(10):
            for batch in torch.randperm(1500).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            summary = monitor.summary()
            print(f"epoch {epoch + 1}")
            print(summary.frame().to_string(float_format="%.3f"))
            monitor.reset()
    with torch.no_grad():
        wrong = (model(images[1500:]).argmax(1) != labels[1500:]).double().mean()
    print(f"test error {100 * float(wrong):.1f}%")


if __name__ == "__main__":
    main()
