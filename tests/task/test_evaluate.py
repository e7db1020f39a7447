"""A task in validation loops, loggers, averages and exports."""

import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.gradients import gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from margin_kernels import AdversarialMarginLoss, LargeMarginLoss, MarginSensitivityLoss, MarginTask, OneToNLoss

CLASSES, N = 5, 7
LAYERS = ("input", "0", "2", "output")


def net(end: str = "pool") -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.ReLU(inplace=end == "in place")]
    ends = {
        "pool": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)],
        "in place": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)],
        "dropout": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, CLASSES)],
        "flat": [nn.Flatten(), nn.Linear(24, CLASSES)],
        "scaled": [nn.Flatten(), nn.Linear(24, CLASSES), nn.Softplus()],
        "tied": [nn.Flatten(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, CLASSES, bias=False)],
    }[end]
    return nn.Sequential(*body, *ends).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (N,), generator=generator)


# The end of a network -> its taps, and those of them that need no backward pass.
ENDS = {
    "pool": (("input", "2", "3", "4", "5", "output"), ("3", "4", "5", "output")),
    "in place": (("2", "3", "4", "output"), ("3", "4", "output")),
    "dropout": (("3", "5", "6", "output"), ("3", "5", "6", "output")),
    "flat": (("3", "4", "output"), ("3", "4", "output")),
    "scaled": (("3", "5", "output"), ("output",)),
    "tied": (("4", "6", "output"), ("6", "output")),
}
OPTIONS = {
    "hard": {"top_k": 2},
    "soft": {"competitors": "soft"},
    "probability": {"space": "probability", "gamma": 0.5},
    "numel": {"layer_scale": "numel", "p": 1},
    "second order": {"second_order": True, "p": "inf"},
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", OPTIONS)
def test_without_gradients_the_loss_has_the_margins_near_the_logits(kind, end, mode) -> None:
    model, (x, y) = net(end).eval(), batch()
    layers, near = ENDS[end]
    how = {"gamma": 3.0, "cross_entropy_weight": 0.5, **OPTIONS[kind]}
    task = MarginTask(model, LargeMarginLoss(**how), layers)
    expected = MarginTask(model, LargeMarginLoss(**how), near)(x, y)["loss"]
    with mode():
        found = task(x, y)
        again = task(x.clone(), y.clone())  # made in inference mode
    torch.testing.assert_close(found["loss"], expected.detach(), rtol=1e-10, atol=1e-12)
    assert torch.equal(again["loss"], found["loss"])
    assert found.get("partial", False) is (layers != near)
    assert not found["loss"].requires_grad


def test_weights_of_layers_and_samples_hold_for_the_part() -> None:
    model, (x, y) = net(), batch()
    weight = torch.linspace(0, 2, N, dtype=torch.float64)
    gamma, layer_weights = [1.0, 2.0, 3.0, 4.0], [0.1, 1.0, 2.0, 0.7]
    whole = LargeMarginLoss(gamma, layer_weights=layer_weights, cross_entropy_weight=1.0, class_weight=[1, 2, 3, 4, 5])
    part = LargeMarginLoss(
        gamma[2:], layer_weights=layer_weights[2:], cross_entropy_weight=1.0, class_weight=[1, 2, 3, 4, 5]
    )
    expected = MarginTask(model, part, ("4", "output"))(x, y, sample_weight=weight)["loss"]
    with torch.no_grad():
        found = MarginTask(model, whole, ("input", "2", "4", "output"))(x, y, sample_weight=weight)
    torch.testing.assert_close(found["loss"], expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_part_is_that_of_a_step(half) -> None:
    model, (x, y) = net().float(), batch()
    task = MarginTask(model, LargeMarginLoss(3.0, cross_entropy_weight=1.0), ("3", "output"))
    with torch.autocast("cpu", half):
        expected = task(x.float(), y)
        with torch.no_grad():
            found = task(x.float(), y)
    torch.testing.assert_close(found["loss"], expected["loss"].detach(), rtol=1e-2, atol=1e-3)


def test_one_logit_has_its_part_as_well() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = batch()
    near = MarginTask(model, LargeMarginLoss(2.0, cross_entropy_weight=1.0), ("2", "output"))(x, y > 2)
    with torch.no_grad():
        found = MarginTask(model, LargeMarginLoss(2.0, cross_entropy_weight=1.0), ("input", "2", "output"))(x, y > 2)
    torch.testing.assert_close(found["loss"], near["loss"].detach(), rtol=1e-10, atol=1e-12)
    assert found["partial"] is True


def test_margins_that_are_asked_for_as_medians_hold_theirs() -> None:
    model, (x, _) = net(), batch()
    y = model(x).argmax(1)
    loss = LargeMarginLoss("auto", cross_entropy_weight=1.0, warmup=1, gamma_factor=2.0)
    task = MarginTask(model, loss, ("4", "output"))
    with torch.no_grad():  # the margin has no weight yet
        torch.testing.assert_close(task(x, y)["loss"], F.cross_entropy(model(x), y))
    with pytest.warns(UserWarning, match='gamma="auto"'):
        for _ in range(3):
            expected = task(x, y)["loss"]
    before = copy.deepcopy(task.auto_gamma.state_dict())
    assert bool(before["fixed"])
    with torch.no_grad():
        torch.testing.assert_close(task(x, y)["loss"], expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(task.evaluate(x, y)["loss"], expected.detach(), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in task.auto_gamma.state_dict().items())


def test_a_forward_without_gradients_holds_no_activation_and_no_hook() -> None:
    model, (x, y) = net(), batch()
    task = MarginTask(model, LargeMarginLoss(3.0), ("input", "3", "output"))
    made: list[weakref.ref] = []
    handle = model[2].register_forward_hook(lambda module, args, output: made.append(weakref.ref(output)))
    with torch.no_grad():
        task(x, y)
    gc.collect()
    assert made[0]() is None
    handle.remove()
    assert all(not module._forward_hooks for module in model.modules())


def test_threads_evaluate_one_model_at_a_time_each_with_its_own_task() -> None:
    model, (x, y) = net(), batch()
    inputs = [x + 0.1 * i for i in range(8)]

    def value(x: Tensor) -> Tensor:
        task = MarginTask(model, LargeMarginLoss(3.0), ("3", "output"))
        with torch.no_grad():
            return torch.stack([task(x, y)["loss"] for _ in range(5)])

    expected = [value(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(value, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


LOSSES = {
    "first order": lambda: LargeMarginLoss(2.0, top_k=2, cross_entropy_weight=1.0),
    "second order": lambda: LargeMarginLoss(2.0, competitors="soft", second_order=True, cross_entropy_weight=1.0),
    "none": lambda: LargeMarginLoss(2.0, reduction="none"),
    "sensitivity": lambda: MarginSensitivityLoss(0.2),
    "adversarial": lambda: AdversarialMarginLoss(2.0, aggregation="avg"),
    "one to n": lambda: OneToNLoss(),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", LOSSES)
def test_evaluation_measures_what_a_step_does_and_leaves_nothing(kind, mode) -> None:
    model, (x, y) = net(), batch()
    task = MarginTask(model, LOSSES[kind](), LAYERS if "order" in kind or kind == "none" else None)
    expected = task(x, y)
    with mode():
        found = task.evaluate(x, y)
        target_by_name = task.evaluate(x.clone(), target=y.clone())
    assert sorted(found) == sorted(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-10, atol=1e-12)
        assert torch.equal(value, target_by_name[name])
        assert not value.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    gradients(expected["loss"].sum(), model)  # the graph of the step is whole


def test_evaluation_takes_the_mode_that_the_task_is_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, CLASSES)).double()
    x, y = batch()
    task = MarginTask(model, LargeMarginLoss(2.0), ("0",)).eval()
    before = copy.deepcopy(model.state_dict())
    found = task.evaluate(x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found["output"], model(x).detach())
    assert not task.training


@pytest.mark.parametrize("kind", LOSSES)
def test_logs_are_flat_scalars(kind) -> None:
    model, (x, y) = net(), batch()
    layers = ("input", "2", "output") if "order" in kind or kind == "none" else None
    task = MarginTask(model, LOSSES[kind](), layers)
    z = model(x).detach()
    with torch.no_grad():
        partial = task(x, y)
    for out in (task(x, y), partial, task.evaluate(x, y)):
        log = task.log(out)
        assert all(
            value.shape == () and value.dtype == torch.float32 and not value.requires_grad for value in log.values()
        )
        torch.testing.assert_close(log["accuracy"], (z.argmax(1) == y).float().mean())
        torch.testing.assert_close(log["nll"], F.cross_entropy(z, y).float())
        torch.testing.assert_close(log["loss"], out["loss"].mean().float())
    if "order" in kind:
        out = task(x, y)
        nearest = out["distance"].amin(1)
        for i, name in enumerate(task.layers):
            torch.testing.assert_close(log[f"distance/{name}"], nearest[:, i].mean().float())
            torch.testing.assert_close(log[f"active/{name}"], out["active"].any(1)[:, i].float().mean())
        assert log["degenerate"] == 0


def test_logs_leave_out_what_is_ignored_degenerate_or_masked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.tensor([0, -100, 1, 2])
    x[2] = 0
    with torch.no_grad():
        model[0].bias.fill_(-1)  # a sample without an active unit has no direction at the input
        model[0].bias[0] = -0.01
    task = MarginTask(model, LargeMarginLoss(1.0, cross_entropy_weight=1.0), ("input",))
    out = task(x, y)
    keep = ~out["degenerate"][:, 0, 0] & out["valid"]
    assert keep.tolist() != out["valid"].tolist()
    log = task.log(out)
    torch.testing.assert_close(log["distance/input"], out["distance"][keep, 0, 0].mean().float())
    torch.testing.assert_close(log["nll"], F.cross_entropy(model(x), y).detach().float())
    torch.testing.assert_close(log["accuracy"], (model(x).argmax(1) == y)[y >= 0].float().mean())


def test_batch_norm_is_updated_and_weights_are_averaged_with_torchs_own_tools() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, CLASSES)).double()
    plain = copy.deepcopy(model)
    x, y = batch()
    task = MarginTask(model, LargeMarginLoss(2.0), ("0",))
    update_bn([(x, y), (2 * x, y)], task)
    update_bn([(x, y), (2 * x, y)], plain)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    averaged = AveragedModel(task)
    averaged.update_parameters(task)
    with torch.no_grad():
        model[3].weight.add_(1.0)
    averaged.update_parameters(task)
    expected = plain[3].weight + 0.5
    torch.testing.assert_close(averaged.module.model[3].weight, expected)
    assert torch.isfinite(averaged(x, y)["loss"])


def test_the_logits_of_a_task_are_exported_and_a_step_says_that_it_is_not() -> None:
    model, (x, y) = net(), batch()
    task = MarginTask(model, LargeMarginLoss(2.0), LAYERS)
    torch.testing.assert_close(torch.export.export(task, (x,)).module()(x)["output"], model(x))
    torch.testing.assert_close(torch.export.export(task.model, (x,)).module()(x), model(x))
    with pytest.raises(Exception, match=r"a training step cannot be exported: torch.export.export\(task.model"):
        torch.export.export(task, (x, y))


@pytest.mark.parametrize("kind", LOSSES)
def test_transforms_of_functions_are_refused_with_what_to_take_instead(kind) -> None:
    model, (x, y) = net(), batch()
    task = MarginTask(model, LOSSES[kind]())
    parameters = dict(task.named_parameters())

    def loss_of(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(task, values, (x, y))["loss"].sum()

    with pytest.raises(ValueError, match=r"torch.func transforms .* take torch.autograd.grad"):
        torch.func.grad(loss_of)(parameters)
    with pytest.raises(ValueError, match=r"torch.func transforms"):
        torch.func.vmap(lambda one: task(one[None], y[:1])["loss"])(x)
    # functional_call by itself is a call like another.
    torch.testing.assert_close(loss_of(parameters), task(x, y)["loss"].sum())


def test_logs_keep_what_is_not_finite() -> None:
    model, (x, y) = net(), batch()
    task = MarginTask(model, LargeMarginLoss(2.0, reduction="none"), ("input",))
    x[0, 0, 0, 0] = float("nan")
    log = task.log(task(x, y))
    assert log["loss"].isnan() and log["nll"].isnan() and log["distance/input"].isnan()
    right = (model(x[1:]).argmax(1) == y[1:]).sum() / N
    torch.testing.assert_close(log["accuracy"], right.float())


def test_logs_of_positions_leave_out_ignored_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, CLASSES, 1)).double()
    x, _ = batch()
    y = torch.randint(CLASSES, (N, 4, 4))
    y[:, :2] = -100
    task = MarginTask(model, LargeMarginLoss(2.0, cross_entropy_weight=1.0), ("input", "1"), positions=3)
    out = task(x, y)
    log = task.log(out)
    torch.testing.assert_close(log["nll"], F.cross_entropy(model(x), y).float())
    assert out["valid"].shape == y.shape and out["valid"].sum() == (y >= 0).sum()
    torch.testing.assert_close(log["distance/1"], out["distance"].amin(2)[..., 1].mean().float())
    y[0] = -100  # no position of a sample counts
    out = task(x, y)
    assert out["degenerate"].sum() == 0 and task.log(out)["degenerate"] == 0
    torch.testing.assert_close(task.log(out)["distance/1"], out["distance"][1:].amin(2)[..., 1].mean().float())


@pytest.mark.parametrize("kind", ["channels first", "channels last", "one logit", "soft targets"])
def test_the_accuracy_of_predictions_at_positions_is_that_of_all(kind) -> None:
    """A step draws 3 of 16 positions, of each sample that has as many."""
    torch.manual_seed(0)
    classes = 1 if kind == "one logit" else 4  # as many as there are rows and columns
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, classes, 1)).double()
    x, _ = batch()
    z = model(x).detach()
    y = torch.randint(max(classes, 2), (N, 4, 4))
    given, counts, class_dim = y, torch.ones_like(y, dtype=torch.bool), 1
    if kind == "soft targets":
        given = torch.full_like(z, 0.1).scatter(1, y[:, None], 0.7)
    else:
        y[:, :2] = y[0] = -100
        counts = y >= 0
    if kind == "channels last":
        model.append(Last())
        class_dim = -1
    predicted = (z[:, 0] > 0).long() if kind == "one logit" else z.argmax(1)
    expected = (predicted == y)[counts].float().mean()
    assert 0 < expected < 1
    loss = LargeMarginLoss(2.0, cross_entropy_weight=1.0)
    task = MarginTask(model, loss, ("input",), positions=3, class_dim=class_dim)
    with torch.no_grad():
        partial = task(x, given)
    for out in (task(x, given), partial, task.evaluate(x, given)):
        torch.testing.assert_close(task.log(out)["accuracy"], expected)
    assert torch.equal(task(x, given)["all_targets"], y)


class Last(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.movedim(1, -1)


def test_a_loss_without_gradients_that_measures_nothing_warns_once() -> None:
    model, (x, y) = net(), batch()
    task = MarginTask(model, LargeMarginLoss(2.0))
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"the loss without gradients is 0: .* evaluate\(\) measures all"):
            assert task(x, y)["loss"] == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            task(x, y)
