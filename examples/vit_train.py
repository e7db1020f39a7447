"""A vision transformer in plain PyTorch, with margins at its input and behind every block.

    python examples/vit_train.py

Attention and layer norm treat samples one by one: the graph shows it, and the step costs as much as cross-entropy's.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import margin_kernels as mk

WIDTH, EPOCHS = 48, 15


class ViT(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)  # 8 x 8 pixels -> 16 tokens
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, WIDTH))
        block = {"nhead": 4, "dim_feedforward": 2 * WIDTH, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, **block) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], dim=1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 0]))


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    model = ViT()
    task = mk.MarginTask(model, mk.presets.standard(), layers=("input", "blocks.*"))
    print(task.explain(images[:50], labels[:50]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            out = task(images[batch], labels[batch])
            out["loss"].backward()
            optimizer.step()
        medians = out["distance"][:, 0].median(dim=0).values.tolist()
        print(f"epoch {epoch + 1}: loss {out['loss'].item():.3f}, distances {[round(d, 2) for d in medians]}")
    with torch.no_grad():
        wrong = (model.eval()(images[1500:]).argmax(1) != labels[1500:]).double().mean()
    print(f"test error {100 * float(wrong):.1f}%")


if __name__ == "__main__":
    main()
