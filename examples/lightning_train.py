"""Lightning's Trainer with a margin loss, and the distances of the test images, on scikit-learn's digits:

    python examples/lightning_train.py

On several devices the same: Trainer(devices=2, strategy="ddp").
"""

import tempfile

import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import margin_kernels as mk
from margin_kernels.integrations.lightning import MarginModule
from margin_kernels.integrations.torchmetrics import MarginDistance

EPOCHS, BATCH = 12, 50


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[:1500], labels[:1500]), BATCH, shuffle=True)
    test = DataLoader(TensorDataset(images[1500:], labels[1500:]), 100)

    features = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU())
    model = nn.Sequential(features, nn.Linear(64, 10))
    task = mk.MarginTask(model, mk.presets.standard(), layers=("input", "0"))
    module = MarginModule(task, lambda parameters: torch.optim.AdamW(parameters, lr=2e-3))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=EPOCHS, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, train, test)
        trainer.test(module, test)

    distance = MarginDistance(layers=len(task.layers), low=-10.0, high=10.0)
    wrong = 0
    for x, y in test:
        out = task.evaluate(x, y)
        distance.update(out)
        wrong += int((out["output"].argmax(1) != y).sum())
    found = distance.compute()
    for name, median in zip(task.layers, found["quantiles"][2].tolist(), strict=True):
        print(f"median distance at {name}: {median:.3f}")
    print(f"test error {100 * wrong / len(labels[1500:]):.1f}%")


if __name__ == "__main__":
    main()
