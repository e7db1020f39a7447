"""A compiled step gives the loss, statistics and gradients of the eager one, under what training loops do with it."""

import copy
import pickle
import re

import pytest
import torch
from support.gradients import gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from margin_kernels import AdversarialMarginLoss, LargeMarginLoss, MarginSensitivityLoss, MarginTask, OneToNLoss
from margin_kernels.gradients.autograd_graph import refusal
from margin_kernels.testing import assert_gradients_agree, assert_same_gradients

CLASSES = 5
# The graph as it is: what is recorded is shown by this, what inductor makes of it by one test below.
RECORDED = {"backend": "eager"}
FUNCTIONAL = {"backend": "aot_eager"}
split_only = pytest.mark.skipif(refusal() is not None, reason="the compiled extension is missing")


def network(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    norm = {"batch": nn.BatchNorm2d(6), "group": nn.GroupNorm(2, 6), None: nn.Identity()}[options.get("norm")]
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        norm,
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Dropout(options.get("dropout", 0.0)),
        nn.Linear(32, CLASSES),
    ).double()


LAYERS = ("input", "3", "5", "output")


def images(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % CLASSES


def step(task: nn.Module, x: Tensor, y: Tensor, factor: float = 1.0) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    task.zero_grad()
    found = task(x, y)
    (factor * found["loss"]).backward()
    return found, [p.grad for p in task.parameters()]


def twins(
    loss: nn.Module, layers: object = None, model: nn.Module | None = None, **options: object
) -> list[MarginTask]:
    """The same task, compiled and not."""
    compiled = options.pop("compile", RECORDED)
    model = network() if model is None else model
    tasks = [MarginTask(copy.deepcopy(model), copy.deepcopy(loss), layers, **options) for _ in range(2)]
    tasks[0].compile(**compiled)
    return tasks


def assert_same_step(compiled: MarginTask, eager: MarginTask, x: Tensor, y: Tensor, least: int = 6) -> None:
    found, ours = step(compiled, x, y, 3.0)
    expected, theirs = step(eager, x, y, 3.0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
    assert_same_gradients(ours, theirs, least)


@pytest.mark.parametrize(
    ("loss", "passes"),
    [
        (LargeMarginLoss(3.0, top_k=2, cross_entropy_weight=1.0), "loop"),
        (LargeMarginLoss(3.0, 1, top_k=4, aggregation="sum", alpha=2.0), "loop"),
        (LargeMarginLoss(3.0, "inf", top_k=2, second_order=True, cross_entropy_weight=1.0), "loop"),
        (LargeMarginLoss(3.0, space="probability", top_k=2, second_order=True), "loop"),
        pytest.param(LargeMarginLoss(3.0), "split", marks=split_only),
        pytest.param(LargeMarginLoss(3.0, top_k=3), "split", marks=split_only),
        (LargeMarginLoss(3.0, space="probability"), "auto"),
        pytest.param(LargeMarginLoss(3.0, auxiliary="pairwise", cross_entropy_weight=1.0), "auto", marks=split_only),
    ],
    ids=repr,
)
def test_large_margin_steps_are_those_of_eager(loss, passes) -> None:
    assert_same_step(*twins(loss, LAYERS, passes=passes), *images())


@split_only
def test_the_tangents_of_a_split_second_order_step() -> None:
    assert_same_step(*twins(LargeMarginLoss(3.0, second_order=True), ("3", "5"), passes="split"), *images())


@pytest.mark.parametrize(
    "loss",
    [
        MarginSensitivityLoss(),
        MarginSensitivityLoss(top_k=1, p="inf", power=1),
        MarginSensitivityLoss(classification="cross_entropy"),
        OneToNLoss(1.0),
        OneToNLoss(0.2, bound="positive", cross_entropy=True),
    ],
    ids=repr,
)
def test_steps_of_the_other_losses_are_those_of_eager(loss) -> None:
    assert_same_step(*twins(loss, compile=FUNCTIONAL), *images())


@pytest.mark.parametrize("gradient", ["unrolled", "envelope", "first_order"])
@pytest.mark.parametrize("aggregation", ["min", "avg"])
def test_adversarial_margins_are_those_of_eager(gradient, aggregation) -> None:
    """Without a mask read on the way: every sample goes every step, and takes part if it is selected."""
    loss = AdversarialMarginLoss(2.0, gradient=gradient, aggregation=aggregation, top_k=2, max_iter=3)
    assert_same_step(*twins(loss), *images())


def test_inductor_makes_kernels_with_the_gradients_of_eager() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    loss = LargeMarginLoss(3.0, top_k=2, second_order=True, cross_entropy_weight=1.0)
    compiled, eager = twins(loss, ("input", "1"), model, passes="loop", compile={})
    x, y = images()
    found, ours = step(compiled, x.float(), y)
    expected, theirs = step(eager, x.float(), y)
    torch.testing.assert_close(found["loss"], expected["loss"])
    for one, other in zip(ours, theirs, strict=True):
        assert_gradients_agree(one, other, 1e-4)


def test_it_trains_to_the_weights_of_eager_training() -> None:
    tasks = twins(LargeMarginLoss(1.0, top_k=2, second_order=True, cross_entropy_weight=1.0), LAYERS)
    for task in tasks:
        optimiser = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
        for seed in range(5):
            step(task, *images(seed=seed))
            optimiser.step()
    for one, other in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_gradients_accumulate_and_a_factor_of_the_loss_reaches_them() -> None:
    compiled, _ = twins(LargeMarginLoss(3.0, top_k=2), LAYERS)
    _, once = step(compiled, *images())
    once = [gradient.clone() for gradient in once]
    (2.5 * compiled(*images())["loss"]).backward()
    assert_same_gradients([p.grad for p in compiled.parameters()], [3.5 * gradient for gradient in once], 6)


def test_a_term_is_added_to_the_loss_in_place() -> None:
    compiled, eager = twins(LargeMarginLoss(3.0, top_k=2), LAYERS)
    x, y = images()
    found = []
    for task in (compiled, eager):
        loss, weight = task(x, y)["loss"], task.model[0].weight
        loss += 0.3 * weight.square().sum()
        found.append((loss.detach(), torch.autograd.grad(loss, weight)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_batch_norm_moves_its_statistics_once_a_step() -> None:
    with pytest.warns(UserWarning, match="couples the samples"):
        compiled, eager = twins(LargeMarginLoss(3.0, top_k=2), LAYERS, network(norm="batch"))
        for seed in (1, 2):
            assert_same_step(compiled, eager, *images(seed=seed))
    for one, other in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert int(compiled.model[1].num_batches_tracked) == 2


def test_frozen_batch_norm_and_eval_mode_are_steps_of_their_own() -> None:
    loss = LargeMarginLoss(3.0, top_k=2)
    compiled, eager = twins(loss, LAYERS, network(norm="batch"), batchnorm="frozen", compile=FUNCTIONAL)
    for task in (compiled, eager):
        task.model[1].running_mean.fill_(0.3)
    assert_same_step(compiled, eager, *images())
    compiled.eval(), eager.eval()
    assert_same_step(compiled, eager, *images())
    torch.testing.assert_close(compiled.model[1].running_mean, eager.model[1].running_mean)


def test_dropout_draws_new_masks_in_every_step_and_one_for_all_passes_of_it() -> None:
    """The gradients belong to the masks of the loss: the same seed gives the loss at displaced weights."""
    compiled, _ = twins(LargeMarginLoss(3.0, top_k=2, second_order=True), LAYERS, network(dropout=0.5))
    x, y = images()
    step(compiled, x, y)

    def seeded() -> Tensor:
        torch.manual_seed(7)
        return compiled(x, y)["loss"]

    weight = compiled.model[4].weight
    direction = torch.randn_like(weight)
    compiled.zero_grad()
    seeded().backward()
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        weight.add_(1e-6 * direction)
        with torch.enable_grad():
            above = seeded().detach()
        weight.sub_(2e-6 * direction)
        with torch.enable_grad():
            below = seeded().detach()
    torch.testing.assert_close(slope, (above - below) / 2e-6, rtol=1e-5, atol=1e-7)
    assert seeded() != compiled(x, y)["loss"]


def test_the_first_step_leaves_random_numbers_and_buffers_to_itself() -> None:
    """Compiling costs no draw: the first compiled step draws what the eager one draws."""
    compiled, eager = twins(LargeMarginLoss(3.0, top_k=2), LAYERS, network(dropout=0.5))
    losses = []
    for task in (compiled, eager):
        torch.manual_seed(3)
        losses.append(task(*images())["loss"].detach())
    torch.testing.assert_close(*losses)


def test_other_shapes_and_other_options_of_the_loss_are_compiled_anew() -> None:
    compiled, eager = twins(LargeMarginLoss(3.0, top_k=2), LAYERS)
    assert_same_step(compiled, eager, *images())
    assert_same_step(compiled, eager, *images(9))
    for task in (compiled, eager):
        task.loss.margin_weight = 0.25
    assert_same_step(compiled, eager, *images())


def test_frozen_parameters_and_inputs_that_require_grad() -> None:
    compiled, eager = twins(LargeMarginLoss(3.0, top_k=2, second_order=True), LAYERS)
    x, y = images()
    inputs = []
    for task in (compiled, eager):
        task.model[0].requires_grad_(False)
        inputs.append(x.clone().requires_grad_())
        step(task, inputs[-1], y)
    assert compiled.model[0].weight.grad is None
    assert_same_gradients([inputs[0].grad], [inputs[1].grad])
    assert_same_gradients([p.grad for p in compiled.parameters()], [p.grad for p in eager.parameters()], 4)


def test_small_gradients_do_not_vanish_under_float16_autocast() -> None:
    """Of a loss as small as this one plain float16 keeps nothing; a GradScaler's factor would come too late."""
    loss = LargeMarginLoss(3.0, top_k=2, margin_weight=1e-7)
    compiled, eager = twins(loss, LAYERS, network().float(), passes="loop")
    x, y = images()
    with torch.autocast("cpu", torch.float16):
        _, ours = step(compiled, x.float(), y)
    _, exact = step(eager, x.float(), y)
    for one, other in zip(ours, exact, strict=True):
        assert_gradients_agree(one, other, 2e-2)


def test_bfloat16_autocast_is_part_of_the_step() -> None:
    loss = LargeMarginLoss(3.0, top_k=2, cross_entropy_weight=1.0)
    compiled, eager = twins(loss, LAYERS, network().float(), passes="loop")
    x, y = images()
    results = []
    for task in (compiled, eager):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(task, x.float(), y))
    assert results[0][0]["output"].dtype == torch.bfloat16
    torch.testing.assert_close(results[0][0]["loss"], results[1][0]["loss"])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert_gradients_agree(one, other, 1e-2)
    torch.testing.assert_close(compiled(x.float(), y)["loss"], eager(x.float(), y)["loss"])


class Odd(nn.Module):
    """A dict as input, a shared layer, attention, checkpointing, a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.unused = nn.Parameter(torch.ones(3))

    def block(self, h: Tensor) -> Tensor:
        q = self.twice(h)
        return h + F.scaled_dot_product_attention(q, h, torch.tanh(self.twice(q)))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        h = self.embed(x["rows"][:, 0])
        return self.head(checkpoint(self.block, h, use_reentrant=False).mean(1))


@pytest.mark.parametrize("passes", ["loop", "auto"])
def test_dicts_shared_layers_attention_and_checkpointing(passes) -> None:
    compiled, eager = twins(LargeMarginLoss(3.0, top_k=2), ("embed", "output"), Odd().double(), passes=passes)
    x, y = images()
    assert_same_step(compiled, eager, {"rows": x}, y)
    assert compiled.model.unused.grad is None


def test_measuring_copying_and_saving_go_on_as_before() -> None:
    compiled, eager = twins(LargeMarginLoss(3.0, top_k=2), LAYERS)
    x, y = images()
    step(compiled, x, y)
    with torch.no_grad():
        found, expected = compiled(x, y), eager(x, y)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["output"], expected["output"])
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    for duplicate in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert_same_step(duplicate, eager, x, y)


def test_what_it_does_not_give_is_an_error() -> None:
    compiled, _ = twins(LargeMarginLoss(3.0, top_k=2), LAYERS)
    x, y = images()
    found = compiled(x, y)
    with pytest.raises(RuntimeError, match="no other term on its output"):
        (found["loss"] + found["output"].sum()).backward()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(compiled(x, y)["loss"], list(compiled.parameters()), create_graph=True)
    compiled, _ = twins(LargeMarginLoss(3.0, reduction="none"), LAYERS)
    with pytest.raises(ValueError, match=r'reduction="none" has a loss per sample'):
        compiled(x, y)
    compiled, _ = twins(AdversarialMarginLoss(2.0), model=network(dropout=0.5))
    with pytest.raises(ValueError, match="same dropout masks"):
        compiled(x, y)
    compiled, _ = twins(OneToNLoss())
    with pytest.raises(ValueError, match=r"a compiled task takes tensors, numbers, words and flags.* got object"):
        compiled(x, object(), y)
    compiled.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter and no input requires grad: there is nothing to train"):
        compiled(x, y)
    with pytest.raises(ValueError, match="layers has 'nothing'"):
        MarginTask(network(), LargeMarginLoss(), ("nothing",)).compile()


class Reads(nn.Module):
    """A forward pass that depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(x.flatten(1))
        return z * 2 if bool(z.sum() > 0) else z


def test_a_model_that_reads_values_is_refused_with_the_reason() -> None:
    compiled, _ = twins(LargeMarginLoss(3.0), model=Reads().double())
    with pytest.raises(ValueError, match="the step cannot be compiled, for it reads a value of a tensor"):
        compiled(*images())


def test_many_kinds_of_steps_are_announced() -> None:
    compiled, _ = twins(OneToNLoss())
    with pytest.warns(UserWarning, match="8 kinds of steps were compiled"):
        for n in range(2, 10):
            compiled(*images(n))


def test_labels_out_of_range_stay_an_error() -> None:
    compiled, _ = twins(LargeMarginLoss(3.0), LAYERS)
    x, y = images()
    compiled(x, y)
    with pytest.raises((ValueError, IndexError), match="target"):
        compiled(x, y + CLASSES)


def test_plain_arguments_that_are_equal_and_of_other_types_are_told_apart() -> None:
    """A step of 1 was taken for one of 1.0; and tensors are told from arguments that are left out."""

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()

        def forward(self, a: Tensor | None = None, b: Tensor | None = None, by: float = 1) -> Tensor:
            found = [layer(x) for layer, x in ((self.left, a), (self.right, b)) if x is not None]
            return sum(found) * (torch.arange(1, 5) * by / (2 if isinstance(by, float) else 1))

    torch.manual_seed(0)
    model, x, y = Sides(), torch.randn(6, 5, dtype=torch.float64), torch.randint(4, (6,))
    task = MarginTask(model, LargeMarginLoss(2.0), "output")
    compiled = MarginTask(model, LargeMarginLoss(2.0), "output")
    compiled.compile(backend="aot_eager")
    for args in ((x, None), (None, x), (x, x), (x, None, 1.0), (x, None, 1)):
        found, expected = compiled(*args, target=y), task(*args, target=y)
        assert torch.equal(found["output"], expected["output"])
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=1e-12)


TORCH_COMPILE = "torch.compile cannot follow the gradients that a step takes, and runs it as it is; task.compile() can"


@pytest.mark.parametrize(
    "loss",
    [
        lambda: LargeMarginLoss(2.0, competitors="soft", cross_entropy_weight=1.0),
        lambda: LargeMarginLoss(2.0, second_order=True),
        lambda: MarginSensitivityLoss(0.2),
        lambda: AdversarialMarginLoss(2.0, aggregation="avg"),
    ],
)
def test_torch_compile_of_a_task_runs_it_as_it_is_and_says_so(loss) -> None:
    """It compiled the model alone, whose graph then showed no batch dimension, and stopped at second derivatives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(4, (6,))
    task = MarginTask(model, loss())
    plain = torch.compile(task, backend="aot_eager")
    with pytest.warns(UserWarning, match=re.escape(TORCH_COMPILE)):
        found = plain(x, y)
    expected = task(x, y)
    assert torch.equal(found["loss"], expected["loss"])
    for one, other in zip(gradients(found["loss"], model), gradients(expected["loss"], model), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad(), pytest.warns(UserWarning, match=re.escape(TORCH_COMPILE)):
        assert torch.equal(plain(x, y)["output"], model(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=re.escape(TORCH_COMPILE)):
        torch.compile(task, backend="aot_eager", fullgraph=True)(x, y)
