"""How far test images are from the decision boundary: cross-entropy beside a margin network.

    python examples/deepfool_evaluation.py

Three measurements: DeepFool's distance, the linearised distance at the input, and accuracy under an attack on the logit
gap, which no scale of the logits can hide from.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import margin_kernels as mk

RADIUS = 0.1  # l_inf, pixels in [0, 1]


def train(loss: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10))
    model = nn.Sequential(*layers)
    task = mk.MarginTask(model, loss, layers=("input",))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(15):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            task(images[batch], labels[batch])["loss"].backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    x, y = images[1500:], labels[1500:]
    for name, loss in (
        ("cross-entropy", mk.LargeMarginLoss(margin_weight=0.0, cross_entropy_weight=1.0)),
        ("robust preset", mk.presets.robust()),
    ):
        model = train(loss, images[:1500], labels[:1500])
        found = mk.deepfool(model, x)
        linear = mk.MarginTask(model, mk.LargeMarginLoss(), layers=("input",)).evaluate(x, y)["distance"][:, 0, 0]
        leaf = x.clone().requires_grad_()
        gap = mk.functional.competitors(model(leaf), y).gap.sum()
        attacked = (x + RADIUS * torch.autograd.grad(gap, leaf)[0].sign()).clamp(0, 1)
        with torch.no_grad():
            wrong, under = ((model(point).argmax(1) != y).double().mean() for point in (x, attacked))
        print(
            f"{name}: DeepFool {found.distance.mean():.3f}, linearised {linear.mean():.3f}, under FGSM {1 - under:.1%}"
        )
    print(f"test error {100 * float(wrong):.1f}%")


if __name__ == "__main__":
    main()
