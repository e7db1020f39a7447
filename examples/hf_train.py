"""transformers' Trainer with a margin loss: a small ViT of drawn weights on scikit-learn's digits.

    python examples/hf_train.py

What is saved is the plain model: ViTForImageClassification.from_pretrained reads it.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import StackDataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import margin_kernels as mk
from margin_kernels.integrations.transformers import MarginTrainer

EPOCHS, BATCH = 12, 50


def accuracy(found) -> dict[str, float]:
    return {"error": float((found.predictions.argmax(1) != found.label_ids).mean())}


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = StackDataset(pixel_values=images[:1500], labels=labels[:1500])
    test = StackDataset(pixel_values=images[1500:], labels=labels[1500:])

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=3e-3,
            lr_scheduler_type="cosine", logging_steps=30, eval_strategy="epoch", save_strategy="no", report_to=[],
        )  # fmt: skip
        trainer = MarginTrainer(
            model=ViTForImageClassification(config),
            args=arguments,
            loss=mk.presets.standard(),
            layers=("vit.embeddings", "vit.layers.*"),
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
        )
        trainer.train()
        found = trainer.evaluate()
        trainer.save_model()
        ViTForImageClassification.from_pretrained(folder)
    print(f"test error {100 * found['eval_error']:.1f}%")


if __name__ == "__main__":
    main()
