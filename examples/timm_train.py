"""timm's own pieces with a margin loss, on scikit-learn's digits: mixup, optimizer, schedule and average of weights.

    python examples/timm_train.py

MarginTrainingTask is a timm.task.TrainingTask: scripts that take one take this one.
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader, TensorDataset

import margin_kernels as mk
from margin_kernels.integrations.timm import MarginTrainingTask

EPOCHS, BATCH, CLASSES = 12, 50, 10


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), BATCH, shuffle=True)
    mixup = Mixup(mixup_alpha=0.1, prob=0.5, num_classes=CLASSES, label_smoothing=0.0)

    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)
    task = MarginTrainingTask(model, mk.presets.standard(), layers=("input", "blocks.*"))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.01)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=2)
    task.setup_ema(decay=0.95)

    for epoch in range(EPOCHS):
        task.train()
        for x, y in loader:
            optimizer.zero_grad()
            out = task(*mixup(x, y))
            out["loss"].backward()
            optimizer.step()
            task.update_ema()
        scheduler.step(epoch + 1)
        print(f"epoch {epoch + 1}: loss {out['loss'].item():.3f}, distance {out['distance'].mean().item():.3f}")

    evaluator = task.create_evaluator()
    with torch.inference_mode():
        evaluator.update(task.get_eval_model(ema=True)(images[1500:]), labels[1500:])
    print(f"test error {100 - evaluator.compute()['top1']:.1f}%")


if __name__ == "__main__":
    main()
