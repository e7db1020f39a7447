"""MarginTrainer in transformers' own Trainer loop, with small networks of drawn weights."""

import os
import socket

import pytest
import torch
from support.processes import Processes

import margin_kernels as mk

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
from safetensors.torch import load_file  # noqa: E402

from margin_kernels.integrations.transformers import STATE, MarginTrainer  # noqa: E402

CLASSES, ROWS = 4, 16
VIT_LAYERS, TEXT_LAYERS = ("vit.embeddings", "vit.layers.*"), ("bert.embeddings", "bert.encoder.layer.0")


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config).double()


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).double()


class Images(torch.utils.data.Dataset):
    def __init__(self, ignored=()):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(ROWS, 3, 8, 8, generator=generator, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (ROWS,), generator=generator)
        self.y[list(ignored)] = -100

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


class Texts(Images):
    def __init__(self):
        super().__init__()
        self.ids = torch.randint(30, (ROWS, 9), generator=torch.Generator().manual_seed(2))

    def __getitem__(self, i):
        mask = (torch.arange(9) < 4 + i % 5).long()
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": self.y[i]}


def arguments(folder, **options):
    given = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **given)


def margin(**options):
    return mk.LargeMarginLoss(1.0, competitors="soft", cross_entropy_weight=1.0, **options)


class Recorded(MarginTrainer):
    """Keeps the batches that it trains on."""

    def __init__(self, *args, **options):
        self.batches = []
        super().__init__(*args, **options)

    def training_step(self, model, inputs, *args):
        self.batches.append(dict(inputs))
        return super().training_step(model, inputs, *args)


def trained(folder, model=None, data=None, layers=VIT_LAYERS, loss=None, **options):
    model = model or vit()
    found = Recorded(
        model=model,
        args=arguments(folder, **options),
        train_dataset=data or Images(),
        eval_dataset=data or Images(),
        loss=loss or margin(),
        layers=layers,
    )
    found.train()
    return found


def joined(batches, size):
    """`size` batches as one."""
    for start in range(0, len(batches), size):
        group = batches[start : start + size]
        yield {name: torch.cat([batch[name] for batch in group]) for name in group[0]}


def by_hand(model, batches, layers=VIT_LAYERS, loss=None):
    task = mk.MarginTask(model, loss or margin(), layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        given = dict(batch)
        out = task(target=given.pop("labels"), **given)
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    return model, losses


def same(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=tolerance, atol=tolerance)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_steps_on_images_are_those_of_a_loop_by_hand(tmp_path):
    trainer = trained(tmp_path)
    expected, losses = by_hand(vit(), trainer.batches)
    same(trainer.model, expected)
    assert isinstance(trainer, transformers.Trainer) and len(losses) == 3
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-4)  # rounded when logged
    assert len(logged(trainer, "margin/distance/vit.embeddings")) == 3


def test_steps_on_tokens_are_those_of_a_loop_by_hand(tmp_path):
    trainer = trained(tmp_path, bert(), Texts(), TEXT_LAYERS)
    assert trainer.task.layers == TEXT_LAYERS
    same(trainer.model, by_hand(bert(), trainer.batches, TEXT_LAYERS)[0])


def test_accumulated_gradients_are_those_of_the_joined_batches(tmp_path):
    """Ignored labels are unevenly spread: the mean is over all labels of a step."""
    data = Images(ignored=(0, 1, 2, 5, 9, 10, 15))
    trainer = trained(tmp_path, data=data, gradient_accumulation_steps=2, max_steps=2)
    valid = [int((batch["labels"] >= 0).sum()) for batch in trainer.batches]
    assert len(valid) == 4 and len(set(valid)) > 1
    expected, losses = by_hand(vit(), joined(trainer.batches, 2))
    same(trainer.model, expected)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-4)


def test_evaluation_has_a_loss_and_metrics(tmp_path):
    seen = {}

    def metrics(found):
        seen["logits"], seen["labels"] = found.predictions, found.label_ids
        return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}

    model, data = vit(), Images()
    for measure in (False, True):
        trainer = MarginTrainer(
            model, arguments(tmp_path), loss=margin(), layers=VIT_LAYERS, measure=measure,
            eval_dataset=data, compute_metrics=metrics,
        )  # fmt: skip
        found = trainer.evaluate()
        task = mk.MarginTask(model.eval(), margin(), VIT_LAYERS)
        parts = [{"pixel_values": data.x[rows], "target": data.y[rows]} for rows in (slice(0, 8), slice(8, 16))]
        with torch.no_grad():
            wanted = [(task.evaluate if measure else task)(**part)["loss"].item() for part in parts]
            logits = model(data.x).logits
        assert found["eval_loss"] == pytest.approx(sum(wanted) / 2)
        torch.testing.assert_close(torch.from_numpy(seen["logits"]), logits)
        assert found["eval_accuracy"] == float((logits.argmax(1) == data.y).double().mean())
        assert not trainer.model.training
    predicted = trainer.predict(torch.utils.data.StackDataset(pixel_values=data.x))  # without labels
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)


def test_training_with_evaluations_between_is_training(tmp_path):
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=1)
    assert len(logged(trainer, "eval_loss")) == 3
    same(trainer.model, by_hand(vit(), trainer.batches)[0])
    trainer.train()  # once more, from these weights
    same(trainer.model, by_hand(vit(), trainer.batches)[0])


@pytest.mark.filterwarnings("ignore:gamma=.auto")
def test_a_checkpoint_is_that_of_the_plain_model_and_goes_on(tmp_path):
    def loss():
        return mk.presets.standard(competitors="hard", warmup=1)

    whole = trained(tmp_path / "whole", loss=loss(), max_steps=4, save_strategy="steps", save_steps=2)
    folder = tmp_path / "whole" / "checkpoint-2"
    plain = transformers.ViTForImageClassification.from_pretrained(folder, dtype=torch.float64)
    assert plain.state_dict().keys() == vit().state_dict().keys()
    same(plain, by_hand(vit(), whole.batches[:2], loss=loss())[0])
    medians = load_file(folder / STATE)
    assert int(medians["seen"]) == 2
    again = Recorded(
        model=vit(), args=arguments(tmp_path / "again", max_steps=4), train_dataset=Images(), loss=loss(),
        layers=VIT_LAYERS,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(folder))
    assert len(again.batches) == 2 and torch.equal(again.batches[0]["labels"], whole.batches[2]["labels"])
    same(again.model, whole.model)
    torch.testing.assert_close(again.task.auto_gamma.state_dict(), whole.task.auto_gamma.state_dict(), rtol=0, atol=0)


def test_the_best_checkpoint_is_loaded_in_the_end(tmp_path):
    found = trained(
        tmp_path, max_steps=4, learning_rate=3.0, save_strategy="steps", eval_strategy="steps", save_steps=1,
        eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    losses = logged(found, "eval_loss")
    best = min(range(4), key=losses.__getitem__) + 1
    assert best < 4 and found.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert found.evaluate()["eval_loss"] == pytest.approx(losses[best - 1])


def test_label_smoothing_is_taken_over_once(tmp_path):
    loss = margin()
    trainer = trained(tmp_path, loss=loss, label_smoothing_factor=0.2)
    same(trainer.model, by_hand(vit(), trainer.batches, loss=margin(label_smoothing=0.2))[0])
    assert loss.label_smoothing == 0 and trainer.task.loss.label_smoothing == 0.2
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0\.2: LargeMarginLoss has 0\.1"):
        trained(tmp_path, loss=margin(label_smoothing=0.1), label_smoothing_factor=0.2)


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def of_a_process(rank, size, folder, address):
    """By process_group: the weights, the batches and the wrapper of one process."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_PORT": address}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    found = {}
    for group in (None, "world"):
        trainer = trained(
            folder, data=Images(ignored=(0, 1, 2, 5, 9)), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=2, loss=margin(process_group=group), ddp_backend="gloo",
        )  # fmt: skip
        weights = {name: value.detach() for name, value in trainer.model.state_dict().items()}
        found[group] = weights, trainer.batches, type(trainer.model_wrapped).__name__
    return found


def test_two_processes_train_like_one(tmp_path):
    processes = Processes(2)
    try:
        of_both = processes.run(of_a_process, str(tmp_path), port())
    finally:
        processes.stop()
    for group in (None, "world"):
        found = [each[group] for each in of_both]
        parts = [batch for both in zip(*(batches for _, batches, _ in found), strict=True) for batch in both]
        assert len(parts) == 8
        expected, _ = by_hand(vit(), joined(parts, 4))
        for weights, _, wrapper in found:
            assert wrapper == "DistributedDataParallel"
            torch.testing.assert_close(weights, dict(expected.state_dict()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options, loss, words",
    [
        ({"torch_compile": True}, {}, r"torch_compile must be False: call trainer\.task\.compile"),
        ({}, {"reduction": "none"}, 'reduction of the loss must be "mean" or "sum", got "none"'),
        ({}, {"ignore_index": 3}, "ignore_index must be -100, which transformers counts by, got 3"),
        ({"gradient_accumulation_steps": 2}, {"class_weight": [1.0] * 4}, "gradient_accumulation_steps must be 1"),
    ],
)
def test_options_that_cannot_hold_are_refused(tmp_path, options, loss, words):
    with pytest.raises(ValueError, match=words):
        MarginTrainer(vit(), arguments(tmp_path, **options), loss=margin(**loss), layers=VIT_LAYERS)


def test_what_would_be_silently_left_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        MarginTrainer(vit(), arguments(tmp_path), loss=margin(), compute_loss_func=lambda *args, **options: 0)
    with pytest.raises(ValueError, match="layers has 'nowhere'"):
        MarginTrainer(vit(), arguments(tmp_path), loss=margin(), layers="nowhere")
    trainer = MarginTrainer(vit(), arguments(tmp_path), loss=margin(), layers=VIT_LAYERS)
    with pytest.raises(ValueError, match=r"inputs must hold 'labels' for a margin loss, got \['pixel_values'\]"):
        trainer.compute_loss(trainer.model, {"pixel_values": Images().x})
