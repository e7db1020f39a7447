"""LargeMarginLoss(gamma="auto") and suggest_gamma: margins as multiples of the distances that a network has."""

import copy
import os
import re
from functools import partial

import pytest
import torch
from support import batches
from support.gradients import gradients
from support.networks import tanh_net
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

from margin_kernels import LargeMarginLoss, MarginTask, OneToNLoss, SuggestedGamma, suggest_gamma

CLASSES, LAYERS = 4, ("input", "1", "3")
batch = partial(batches.normal, n=7, classes=CLASSES)
pytestmark = pytest.mark.filterwarnings("ignore:gamma=")


def trained(seed: int = 1) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network that is right about most of its batch."""
    net, (x, y) = tanh_net(6, 8, 5, CLASSES), batch(n=12, seed=seed)
    optimiser = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net, x, y


def auto(**options) -> LargeMarginLoss:
    return LargeMarginLoss("auto", **{"cross_entropy_weight": 1.0, "warmup": 2, "gamma_factor": 1.5, **options})


def medians(net: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    """Of the distances to the nearest competitor on the right side, by their sorted list; torch takes the lower of two
    in the middle."""
    distance = MarginTask(net, LargeMarginLoss(**options), LAYERS)(x, y)["distance"].amin(1)
    found = []
    for column in distance.unbind(1):
        right = column[column > 0].sort().values
        found.append(right[(len(right) - 1) // 2])
    return torch.stack(found)


@pytest.mark.parametrize("competitors", ["hard", "soft"])
@pytest.mark.parametrize("layer_weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("layer_reduction", ["mean", "sum"])
def test_after_the_warm_up_it_is_the_loss_with_scale_free_terms(competitors, layer_weights, layer_reduction) -> None:
    net, x, y = trained()
    options = {"competitors": competitors, "alpha": 1.0, "layer_reduction": layer_reduction}
    task = MarginTask(net, auto(layer_weights=layer_weights, gamma_factor=2.5, **options), LAYERS)
    for _ in range(2):
        out = task(x, y)
        torch.testing.assert_close(out["loss"], F.cross_entropy(net(x), y), rtol=1e-12, atol=0)
        assert not out["active"].any()
    found = task(x, y)
    gamma = 2.5 * medians(net, x, y, competitors=competitors)
    torch.testing.assert_close(2.5 * task.auto_gamma.median, gamma, rtol=1e-12, atol=0)
    weight = torch.tensor(layer_weights or [1.0] * 3, dtype=torch.float64)
    terms = ((gamma - found["distance"].amin(1)).clamp(min=0).minimum(gamma) / gamma) @ weight
    terms = terms / (weight.sum() if layer_reduction == "mean" else 1.0)
    torch.testing.assert_close(found["loss"], terms.mean() + F.cross_entropy(net(x), y), rtol=1e-12, atol=0)
    assert found["active"].any()
    plain = LargeMarginLoss(
        gamma.tolist(),
        cross_entropy_weight=1.0,
        **{**options, "layer_reduction": "sum"},
        layer_weights=(weight / gamma / (weight.sum() if layer_reduction == "mean" else 1.0)).tolist(),
    )
    expected = MarginTask(net, plain, LAYERS)(x, y)["loss"]
    for g, e in zip(gradients(found["loss"], net), gradients(expected, net), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_the_median_runs_and_is_fixed_after_the_warm_up() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(warmup=30), LAYERS)
    expected: Tensor | None = None
    for number in range(40):
        part = torch.randperm(12, generator=torch.Generator().manual_seed(number))[:5]
        one = medians(net, x[part], y[part])
        rate = max(1 / (number + 1), 0.05)
        if not bool(task.auto_gamma.fixed):
            expected = one if expected is None else expected + rate * (one - expected)
        task(x[part], y[part])
        torch.testing.assert_close(task.auto_gamma.median, expected)
    assert task.auto_gamma.fixed and task.auto_gamma.steps == 31


def test_no_margin_while_the_network_is_wrong_about_most_samples() -> None:
    net, x, y = trained()
    wrong = (y + 1) % CLASSES
    wrong[0] = y[0]
    task = MarginTask(net, auto(warmup=0), LAYERS)
    for _ in range(5):
        out = task(x, wrong)
        torch.testing.assert_close(out["loss"], F.cross_entropy(net(x), wrong), rtol=1e-12, atol=0)
        assert not task.auto_gamma.fixed
    torch.testing.assert_close(task.auto_gamma.right, torch.full((3,), 1 / 12, dtype=torch.float64))
    torch.testing.assert_close(task.auto_gamma.median, medians(net, x[:1], y[:1]))
    for _ in range(5):
        task(x, y)
    assert task.auto_gamma.fixed and (task.auto_gamma.right > 0.2).all()


def test_wrong_labels_do_not_move_the_median() -> None:
    net, x, y = trained()
    some = y.clone()
    some[:7] = (y[:7] + 1) % CLASSES
    task = MarginTask(net, auto(), LAYERS)
    task(x, some)
    torch.testing.assert_close(task.auto_gamma.median, medians(net, x[7:], y[7:]))


def test_it_says_once_that_the_margin_waits() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(warmup=7), LAYERS)
    with pytest.warns(UserWarning, match="no weight until the network was right about 20% of the samples in 7") as told:
        task(x, y)
        task(x, y)
    assert len(told) == 1


def test_the_state_is_saved_with_the_task() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(), LAYERS)
    for _ in range(3):
        task(x, y)
    other = MarginTask(copy.deepcopy(net), auto(), LAYERS)
    other.load_state_dict(task.state_dict())
    assert other.auto_gamma.fixed and torch.equal(other.auto_gamma.median, task.auto_gamma.median)
    assert torch.equal(other(x, y)["loss"], task(x, y)["loss"])
    twin = copy.deepcopy(task)
    assert torch.equal(twin(x, y)["loss"], task(x, y)["loss"])
    # A task that was fixed takes up a state that is not.
    for _ in range(60):
        task(x, y)
    task.load_state_dict(MarginTask(net, auto(), LAYERS).state_dict())
    assert not task(x, y)["active"].any() and not task.auto_gamma.fixed


AVERAGES = {
    "equal": {},
    "equal, together": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "exponential": {"avg_fn": swa_utils.get_ema_avg_fn(0.5)},
    "exponential, together": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)},
}


@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_of_tasks_averages_the_medians(how) -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(warmup=2), LAYERS)
    average = swa_utils.AveragedModel(task, use_buffers=True, **AVERAGES[how])
    states = []
    for _ in range(5):
        task(x, y)
        average.update_parameters(task)
        states.append({name: value.clone() for name, value in task.auto_gamma.state_dict().items()})
    found = average.module.auto_gamma
    assert [state["fixed"].item() for state in states] == [0, 0, 1, 1, 1]
    weights = [0.2] * 5 if how.startswith("equal") else [0.0625, 0.0625, 0.125, 0.25, 0.5]
    for name, value in found.state_dict().items():
        expected = sum(w * state[name] for w, state in zip(weights, states, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert average.module.evaluate(x, y)["loss"].item() == pytest.approx(
            task.evaluate(x, y)["loss"].item(), rel=1e-5
        )


def test_once_fixed_the_medians_stay_fixed_though_the_warm_up_is_lengthened() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(warmup=2), LAYERS)
    for _ in range(3):
        task(x, y)
    assert task.auto_gamma.fixed
    before, task.loss.warmup = task.auto_gamma.median.clone(), 100
    task(2 * x, y)
    assert task.auto_gamma.fixed and torch.equal(task.auto_gamma.median, before)


def test_medians_that_are_written_back_in_place_are_followed_again() -> None:
    """As loops do that swap a network for its average and back."""
    net, x, y = trained()
    task = MarginTask(net, auto(warmup=2), LAYERS)
    task(x, y)
    saved = [buffer.clone() for buffer in task.buffers()]
    for _ in range(60):
        task(x, y)
    with torch.no_grad():
        for buffer, value in zip(task.buffers(), saved, strict=True):
            buffer.copy_(value)
    other = MarginTask(net, auto(warmup=2), LAYERS)
    other.load_state_dict(task.state_dict())
    for expected in (0, 1):
        found, wanted = task(x, y), other(x, y)
        assert torch.equal(found["loss"], wanted["loss"]) and task.auto_gamma.fixed == expected
        assert found["active"].any() == bool(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_medians_keep_their_precision_whatever_the_network_is(dtype) -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(warmup=2), LAYERS)
    task(x, y)
    task.auto_gamma.median[0] = 1e5 + 1 / 3
    assert task.auto_gamma.median.dtype == torch.float64
    before = copy.deepcopy(task.auto_gamma.state_dict())
    task.to(dtype)
    assert next(task.model.parameters()).dtype == dtype
    for name, value in task.auto_gamma.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_an_empty_batch_says_nothing_of_the_medians() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(), LAYERS)
    task(x, y)
    before = copy.deepcopy(task.auto_gamma.state_dict())
    assert task(x[:0], y[:0])["loss"].isnan()
    assert all(torch.equal(value, before[name]) for name, value in task.auto_gamma.state_dict().items())


def test_the_compiled_step_is_that_of_eager() -> None:
    found = []
    for compiled in (False, True):
        net, x, y = trained()
        task = MarginTask(net, auto(competitors="soft"), LAYERS)
        if compiled:
            task.compile(backend="aot_eager")
        losses = []
        for number in range(5):
            net.zero_grad()
            out = task(x[number:], y[number:]) if number > 3 else task((1 + number) * x, y)
            out["loss"].backward()
            losses.append(out["loss"].detach())
        state = task.auto_gamma.state_dict().values()
        found.append([torch.stack(losses), *(value.clone() for value in state), *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert found[0][0][2] > found[0][0][1]


def test_a_compiled_step_follows_the_medians_of_a_state_that_is_loaded() -> None:
    net, x, y = trained()
    tasks = [MarginTask(copy.deepcopy(net), auto(warmup=2), LAYERS) for _ in range(2)]
    fresh = copy.deepcopy(tasks[0].state_dict())
    for task in tasks:
        for _ in range(3):
            task(x, y)
        assert task.auto_gamma.fixed
    tasks[0].compile(backend="aot_eager")
    for number in range(7):
        if number == 2:
            for task in tasks:
                task.load_state_dict(fresh)
        found, expected = (task((1 + number) * x, y)["loss"] for task in tasks)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        for one, other in zip(tasks[0].auto_gamma.buffers(), tasks[1].auto_gamma.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
        assert bool(tasks[0].auto_gamma.fixed) == (number not in (2, 3))


def test_in_eval_mode_the_medians_stay() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(), LAYERS)
    task(x, y)
    before = task.auto_gamma.median.clone()
    task.eval()
    for _ in range(5):
        task(x[:4], y[:4])
    assert torch.equal(task.auto_gamma.median, before) and task.auto_gamma.seen == 1


def test_schedules_of_the_factor_are_live() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(), LAYERS)
    for _ in range(3):
        before = task(x, y)["loss"]
    task.loss.gamma_factor = 5.0
    assert task(x, y)["loss"] > before


def test_degenerate_and_ignored_samples_do_not_move_the_median() -> None:
    net, x, y = trained()
    some = y.clone()
    some[::3] = -100
    kept = some != -100
    task = MarginTask(net, auto(), LAYERS)
    task(x, some)
    torch.testing.assert_close(task.auto_gamma.median, medians(net, x[kept], y[kept]))


def test_suggested_lists_are_those_of_auto() -> None:
    net, x, y = trained()
    task = MarginTask(net, auto(alpha=1.0, competitors="soft"), LAYERS)
    net.train()
    found = suggest_gamma(task, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert isinstance(found, SuggestedGamma) and net.training and task.auto_gamma.seen == 0
    expected = 1.5 * medians(net, x, y, competitors="soft")
    torch.testing.assert_close(torch.tensor(found.gamma).double(), expected)
    for _ in range(3):
        automatic = task(x, y)["loss"]
    loss = LargeMarginLoss(**found._asdict(), alpha=1.0, competitors="soft", cross_entropy_weight=1.0)
    torch.testing.assert_close(MarginTask(net, loss, LAYERS)(x, y)["loss"], automatic, rtol=1e-10, atol=0)


def test_suggestions_are_refused_for_a_network_that_is_wrong() -> None:
    net, x, y = trained()
    task = MarginTask(net, LargeMarginLoss(), LAYERS)
    with pytest.raises(ValueError, match="train first: the network is wrong on half of the samples"):
        suggest_gamma(task, [(x, (y + 1) % CLASSES)])
    with pytest.raises(ValueError, match="loader must hold at least one batch"):
        suggest_gamma(task, [])
    for nothing in ((x[:0], y[:0]), (x, torch.full_like(y, -100))):
        with pytest.raises(ValueError, match="loader must hold samples whose margin can be measured, got none"):
            suggest_gamma(task, [nothing])
    with pytest.raises(ValueError, match="factor must be finite and > 0, got 0"):
        suggest_gamma(task, [(x, y)], factor=0)
    with pytest.raises(TypeError, match="task must be a MarginTask with LargeMarginLoss"):
        suggest_gamma(MarginTask(net, OneToNLoss()), [(x, y)])


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(ValueError, match='cross_entropy_weight must be > 0 with gamma="auto"'):
        LargeMarginLoss("auto")
    with pytest.raises(ValueError, match="gamma_factor must be finite and > 0, got -1"):
        auto(gamma_factor=-1)
    with pytest.raises(TypeError, match="warmup must be an integer"):
        auto(warmup=1.5)
    with pytest.raises(TypeError, match=r"gamma must be a number, a list of .* or .auto., got 'median'"):
        LargeMarginLoss("median")
    z = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=re.escape("gamma must be a number or a list without a MarginTask")):
        auto()(z, torch.tensor([0, 1, 2]), [z])


def train_on_one_of_two(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    net, x, y = trained()
    task = MarginTask(net, auto(warmup=1), LAYERS)
    wrapped = DistributedDataParallel(task)
    part = slice(6 * rank, 6 * rank + 6)
    states = []
    for _ in range(4):
        net.zero_grad()
        wrapped(x[part], y[part])["loss"].backward()
        states.append((task.auto_gamma.median.clone(), task.auto_gamma.fixed.clone()))
    torch.save((states, [p.grad for p in net.parameters()]), f"{file}.{rank}")
    torch.distributed.barrier()
    os._exit(0)  # as in test_task.py: gloo's threads must not meet an interpreter that is closing


def test_all_processes_ask_for_the_same_margin(tmp_path) -> None:
    file = str(tmp_path / "store")
    multiprocessing.spawn(train_on_one_of_two, (file,), nprocs=2)
    (first, g), (second, h) = (torch.load(f"{file}.{rank}") for rank in range(2))
    net, x, y = trained()
    expected = medians(net, x, y)
    for (one, fixed), (other, fixed_too) in zip(first, second, strict=True):
        torch.testing.assert_close(one, expected)
        assert torch.equal(one, other) and fixed == fixed_too
    assert [bool(fixed) for _, fixed in first] == [False, True, True, True]
    for a, b in zip(g, h, strict=True):
        assert torch.equal(a, b)
    loss = LargeMarginLoss(
        (1.5 * expected).tolist(),
        cross_entropy_weight=1.0,
        layer_weights=(1 / (4.5 * expected)).tolist(),
        layer_reduction="sum",
    )
    whole = gradients(MarginTask(net, loss, LAYERS)(x, y)["loss"], net)
    for a, b in zip(g, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
