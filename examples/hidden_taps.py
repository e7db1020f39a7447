"""Margins at hidden layers of one's own choice: by names and patterns in a task, and by hand on tensors.

    python examples/hidden_taps.py

Both ways give the same loss and the same gradients; the task finds the cheaper passes by itself.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import margin_kernels as mk


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.hidden, self.head = nn.Linear(256, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.hidden(self.features(x).flatten(1))))


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = Network()
    # gamma: one number for each layer. suggest_gamma measures them, once the network is right on most samples.
    loss = mk.LargeMarginLoss(cross_entropy_weight=1.0, alpha=1.0)
    task = mk.MarginTask(model, loss, layers=("features.*", "hidden"))
    print("taps:", ", ".join(task.layers))
    print(task.explain(images[:50], labels[:50]))

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(10):
        if epoch == 2:
            task.loss.gamma = mk.suggest_gamma(task, [(images[:500], labels[:500])], factor=1.5).gamma
            print("gamma:", {name: round(gamma, 2) for name, gamma in zip(task.layers, task.loss.gamma, strict=True)})
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            task(images[batch], labels[batch])["loss"].backward()
            optimizer.step()

    x, y, loss = images[:50], labels[:50], mk.LargeMarginLoss(gamma=8.0)
    in_task = mk.MarginTask(model, loss, layers=("hidden",))(x, y)["loss"]
    h = model.hidden(model.features(x).flatten(1))  # by hand: the activations of a forward pass of yours
    by_hand = loss(model.head(F.relu(h)), y, activations=[h])
    print(f"margin loss at hidden: {in_task.item():.5f} in a task, {by_hand.item():.5f} by hand")
    with torch.no_grad():
        wrong = (model(images[1500:]).argmax(1) != labels[1500:]).double().mean()
    print(f"test error {100 * float(wrong):.1f}%")


if __name__ == "__main__":
    main()
