"""MarginTrainingTask in timm's own pieces: data, mixup, optimizer, scheduler, average, evaluator, checkpoints."""

import copy

import numpy as np
import pytest
import torch
from support.processes import Processes
from torch.nn import functional as F

import margin_kernels as mk

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
from PIL import Image  # noqa: E402
from timm.data import Mixup, create_dataset, create_loader  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.task import TrainingTask, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV3  # noqa: E402

from margin_kernels.integrations.timm import MarginTrainingTask  # noqa: E402

CLASSES, SIZE, LAYERS = 4, 32, ("input", "blocks.*")


def network():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES
    )


def margin(**options):
    return mk.LargeMarginLoss(1.0, competitors="soft", cross_entropy_weight=1.0, **options)


def automatic():
    return mk.presets.standard(competitors="hard", warmup=0)


def batches(count, soft=False):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(6, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (6,), generator=generator)
        yield x, 0.7 * F.one_hot(y, CLASSES).double() + 0.3 * F.one_hot(y.roll(1), CLASSES) if soft else y


def by_hand(model, loss, pairs, layers=LAYERS):
    """The model after steps of SGD on pairs, in a loop with MarginTask."""
    task = mk.MarginTask(model, loss, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in pairs:
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()
    return model


def same(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "mixup"])
def test_steps_are_those_of_a_loop_by_hand(soft):
    expected = by_hand(network().double(), margin(), batches(3, soft))
    model = network().double()
    task = MarginTrainingTask(model, margin(), LAYERS, dtype=torch.float64)
    assert isinstance(task, TrainingTask) and task.get_trainable_module() is model is task.get_eval_model()
    optimizer = torch.optim.SGD(task.get_clip_parameters(), lr=0.05, momentum=0.9)
    for x, y in batches(3, soft):
        optimizer.zero_grad()
        with task.no_sync():
            out = task(x, y)
        out["loss"].backward()
        optimizer.step()
        assert out["distance"].shape == (6, 1, 3)
    same(model, expected)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), network().double().parameters(), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder: two splits of four classes, noise around a colour."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 6)):
        for label in range(CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                colour = 60 * label + rng.integers(0, 60, (SIZE, SIZE, 3))
                Image.fromarray(colour.astype(np.uint8)).save(root / split / f"class{label}" / f"{i}.png")
    return root


def loader(folder, split):
    return create_loader(
        create_dataset("", root=str(folder / split)),
        input_size=(3, SIZE, SIZE),
        batch_size=8,
        is_training=split == "train",
        use_prefetcher=False,
        num_workers=0,
        device=torch.device("cpu"),
        no_aug=True,
        hflip=0.0,
    )


def test_a_loop_of_timms_own_pieces_trains_averages_evaluates_and_goes_on(folder, tmp_path):
    """The loop of timm's training script, in short; the same batches give the same weights by hand."""
    torch.manual_seed(0)
    train, validation = loader(folder, "train"), loader(folder, "validation")
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    task = MarginTrainingTask(network(), margin(), LAYERS)
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    epochs, updates = 3, len(train)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, updates_per_epoch=updates, step_on_epochs=False, warmup_epochs=1
    )
    average = task.setup_ema(decay=0.9)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    # The same by hand.
    own = network()
    own_task = mk.MarginTask(own, margin(), LAYERS)
    own_optimizer = create_optimizer_v2(own, opt="adamw", lr=2e-3, weight_decay=0.05)
    own_average = [tensor.clone() for tensor in own.state_dict().values()]

    step, scores = 0, []
    for epoch in range(epochs):
        task.train()
        for x, y in train:
            x, y = mixup(x, y)
            assert y.shape == (8, CLASSES) and y.is_floating_point()
            optimizer.zero_grad()
            out = task(x, y)
            out["loss"].backward()
            torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            step += 1
            task.update_ema(step=step)
            scheduler.step_update(num_updates=step)

            own_optimizer.zero_grad()
            own_task(x, y)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            for group, given in zip(own_optimizer.param_groups, optimizer.param_groups, strict=True):
                group["lr"] = rate * group.get("lr_scale", 1.0)
                assert given["weight_decay"] == group["weight_decay"]
            own_optimizer.step()
            decay = average.get_decay(step)
            for mean, value in zip(own_average, own.state_dict().values(), strict=True):
                mean.lerp_(value, 1 - decay)
        for ema in (False, True):
            task.eval()
            evaluator = task.create_evaluator()
            with torch.inference_mode():
                for x, y in validation:
                    evaluator.update(task.get_eval_model(ema=ema)(x), y)
            scores.append(evaluator.compute()["top1"])
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=scores[-1])

    same(model, own, 1e-6)
    assert isinstance(average, ModelEmaV3)
    torch.testing.assert_close(list(average.module.state_dict().values()), own_average, rtol=1e-5, atol=1e-6)
    assert max(scores) > 100 / CLASSES  # better than chance
    again = MarginTrainingTask(network(), margin(), LAYERS)
    assert resume_task_checkpoint(again, str(tmp_path / "last.pth.tar"), log_info=False) == epochs
    same(again.get_trainable_module(), model, 0)
    plain = network()  # the keys are those of the plain model
    plain.load_state_dict(torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"])
    same(plain, model, 0)


@pytest.mark.filterwarnings("ignore:gamma=.auto")
def test_the_medians_of_an_automatic_margin_are_the_tasks_state_in_a_checkpoint():
    task = MarginTrainingTask(
        network().double(), mk.presets.standard(competitors="hard", warmup=0), LAYERS, dtype=torch.float64
    )
    for x, y in batches(3):
        task(x, y)
    state = task.get_checkpoint_state()
    medians = task.margin_task.auto_gamma.state_dict()
    assert list(state) == ["state_dict", "task_state"] and int(medians["seen"]) > 0 and medians["median"].all()
    again = MarginTrainingTask(
        network().double(), mk.presets.standard(competitors="hard", warmup=0), LAYERS, dtype=torch.float64
    )
    again.load_checkpoint_state(state["state_dict"], state["task_state"])
    torch.testing.assert_close(again.margin_task.auto_gamma.state_dict(), medians, rtol=0, atol=0)
    again.load_checkpoint_state(state["state_dict"])  # of a run with another loss: they stay
    torch.testing.assert_close(again.margin_task.auto_gamma.state_dict(), medians, rtol=0, atol=0)


def test_validation_and_an_average_leave_the_training_as_it_is():
    model = network().double()
    task = MarginTrainingTask(model, margin(), LAYERS, dtype=torch.float64)
    (x, y), *_ = batches(1)
    before = copy.deepcopy(model.state_dict())
    task.eval()
    with torch.no_grad():
        out = task(x, y)
    assert torch.equal(out["output"], model(x)) and out["loss"].isfinite()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert task.get_checkpoint_state(ema=True) == {} and task.get_task_state() == {}


def test_a_compiled_task_trains_like_another():
    expected = by_hand(network().double(), margin(), batches(2), ("blocks.0",))
    task = MarginTrainingTask(network().double(), margin(), ("blocks.0",), dtype=torch.float64)
    assert task.compile(backend="aot_eager") is task.get_trainable_module()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)
    for x, y in batches(2):
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()
    same(task.get_trainable_module(), expected, 1e-10)


def part(rank, size):
    """Two steps on a part of each batch, the first with gradients of two halves accumulated."""
    task = MarginTrainingTask(network().double(), margin(), LAYERS, dtype=torch.float64).prepare_distributed()
    optimizer = torch.optim.SGD(task.get_clip_parameters(), lr=0.05, momentum=0.9)
    first, second = batches(2)
    rows = torch.arange(6).chunk(size)[rank]
    optimizer.zero_grad()
    with task.no_sync():
        (task(first[0][rows], first[1][rows])["loss"] / 2).backward()
    (task(first[0][rows], first[1][rows])["loss"] / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    task(second[0][rows], second[1][rows])["loss"].backward()
    optimizer.step()
    return {name: value.detach() for name, value in task.get_checkpoint_state()["state_dict"].items()}


def test_two_processes_train_like_one():
    processes = Processes(2)
    try:
        found = processes.run(part)
    finally:
        processes.stop()
    expected = by_hand(network().double(), margin(), batches(2)).state_dict()
    for each in found:
        torch.testing.assert_close(each, dict(expected), rtol=1e-12, atol=1e-12)


def test_wrong_options_are_those_of_a_margin_task():
    with pytest.raises(ValueError, match="layers has 'nowhere'"):
        MarginTrainingTask(network(), margin(), ("nowhere",))
    with pytest.raises(ValueError, match="passes must be one of"):
        MarginTrainingTask(network(), margin(), LAYERS, passes="none")
