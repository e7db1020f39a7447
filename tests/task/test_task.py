"""MarginTask: what a training loop sees, under the conditions that training loops make."""

import copy
import os
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.multiprocessing as multiprocessing
from support import batches
from support.networks import Tokens
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from margin_kernels import AdversarialMarginLoss, LargeMarginLoss, MarginSensitivityLoss, MarginTask, OneToNLoss

CLASSES = 4


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


LAYERS = ("input", "0", "3", "4", "output")


batch = partial(batches.normal, shape=(2, 6, 6), classes=CLASSES, dtype=torch.float32)


def stored_gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)


def keep(kept: dict[str, Tensor], name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
    kept[name] = output


def norms_one_sample_at_a_time(model: nn.Module, layers, out: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The definition, sample by sample, with the activations kept by plain hooks."""
    rows = []
    for n in range(len(y)):
        kept: dict[str, Tensor] = {"input": x[n : n + 1].clone().requires_grad_()}
        handles = [
            model.get_submodule(name).register_forward_hook(partial(keep, kept, name))
            for name in layers
            if name not in ("input", "output")
        ]
        kept["output"] = z = model(kept["input"])
        for handle in handles:
            handle.remove()
        row = []
        for i in out["competitor"][n]:
            found = torch.autograd.grad(z[0, i] - z[0, y[n]], [kept[name] for name in layers], retain_graph=True)
            row.append(torch.stack([g.norm() for g in found]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(
    ("make", "layers", "shape"),
    [
        (conv_net, LAYERS, (2, 6, 6)),
        (
            partial(Tokens, encoder, 2, CLASSES),
            ("input", "patches", "blocks.0", "blocks.1", "norm", "output"),
            (2, 6, 6),
        ),
        (
            lambda: nn.Sequential(
                nn.Conv3d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, CLASSES)
            ),
            ("input", "0", "1", "2", "3"),
            (2, 4, 5, 5),
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, CLASSES)),
            ("input", "0", "1", "2"),
            (2, 9),
        ),
    ],
    ids=["images", "tokens", "volumes", "signals"],
)
def test_norms_are_those_of_single_samples(make, layers, shape, second_order) -> None:
    torch.manual_seed(0)
    model = make().double()
    x, y = torch.randn(3, *shape, dtype=torch.float64), torch.tensor([0, 3, 1])
    # Of the attention kernels, only the plain one can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH):
        out = MarginTask(model, LargeMarginLoss(top_k=2, second_order=second_order), layers)(x, y)
        expected = norms_one_sample_at_a_time(model, layers, out, x, y)
        out["loss"].backward()
    torch.testing.assert_close(out["norm"], expected, rtol=1e-10, atol=1e-12)


def test_the_default_tap_is_the_input() -> None:
    task = MarginTask(conv_net(), LargeMarginLoss())
    assert task.layers == ("input",)
    assert task(*batch())["distance"].shape == (6, 1, 1)


def test_layers_shows_the_names_in_the_order_of_the_statistics() -> None:
    x, y = batch()
    forwards = MarginTask(conv_net(), LargeMarginLoss(), ("0", "output", "4"))
    backwards = MarginTask(conv_net(), LargeMarginLoss(), ("4", "output", "0"))
    assert forwards.layers == ("0", "output", "4")
    torch.testing.assert_close(forwards(x, y)["norm"], backwards(x, y)["norm"].flip(-1))


def test_without_gradients_there_are_the_logits_statistics_and_a_part_of_the_loss() -> None:
    x, y = batch()
    task = MarginTask(conv_net(), LargeMarginLoss(top_k=2), LAYERS)
    full = task(x, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = task(x, y)
        assert sorted(out) == ["competitor", "gap", "loss", "nll", "output", "partial", "target", "valid"]
        assert all(torch.equal(out[name], full[name]) for name in out if name not in ("loss", "partial"))
        assert out["partial"] is True
    task(x, y)["loss"].backward()


@pytest.mark.parametrize(
    ("loss", "statistics"),
    [
        (MarginSensitivityLoss(), ["classification", "gap", "loss", "nll", "output", "partial", "target", "valid"]),
        (OneToNLoss(), ["gap", "loss", "nll", "output", "per_sample", "target", "valid"]),
    ],
    ids=["sensitivity", "one_to_n"],
)
def test_without_gradients_every_loss_shows_what_the_logits_show(loss, statistics) -> None:
    x, y = batch()
    task = MarginTask(conv_net(), loss)
    full = task(x, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = task(x, y)
        assert sorted(out) == statistics
        assert all(torch.equal(out[name], full[name]) for name in out if name not in ("loss", "partial"))
    task(x, y)["loss"].backward()


def test_a_loss_of_the_logits_costs_one_plain_forward_and_has_no_taps() -> None:
    x, y = batch()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, CLASSES))
    reference = copy.deepcopy(model)
    seen: list[bool] = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    task = MarginTask(model, OneToNLoss())
    assert task.layers == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(task(x, y)["output"], reference(x))
    assert seen == [False]


@pytest.mark.parametrize("option", [{"passes": "split"}, {"passes": "loop"}, {"batchnorm": "frozen"}, {"batch_dim": 0}])
def test_options_without_effect_are_refused(option) -> None:
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"{name} must be .* for OneToNLoss, which measures at no tap"):
        MarginTask(nn.Linear(4, CLASSES), OneToNLoss(), **option)


def test_layers_are_refused_for_a_loss_of_the_logits() -> None:
    with pytest.raises(ValueError, match=r"layers must be None for OneToNLoss, which measures at no tap, got"):
        MarginTask(conv_net(), OneToNLoss(), ("input",))


def test_accumulated_gradients_are_the_sum() -> None:
    x, y = batch(dtype=torch.float64)
    model = conv_net().double()
    task = MarginTask(model, LargeMarginLoss(3.0, reduction="sum"), LAYERS)
    task(x, y)["loss"].backward()
    whole = stored_gradients(model)
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        task(x[part], y[part])["loss"].backward()
    for a, b in zip(stored_gradients(model), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_channels_last_changes_nothing_but_rounding() -> None:
    x, y = batch()
    task = MarginTask(conv_net(), LargeMarginLoss(3.0, top_k=2), LAYERS)
    expected = task(x, y)
    task = task.to(memory_format=torch.channels_last)
    actual = task(x.contiguous(memory_format=torch.channels_last), y)
    torch.testing.assert_close(actual["norm"], expected["norm"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("space", ["logit", "probability"])
def test_autocast_keeps_norms_and_loss_in_float32(second_order, space) -> None:
    x, y = batch()
    model = conv_net()
    task = MarginTask(model, LargeMarginLoss(3.0, space=space, second_order=second_order), LAYERS)
    expected = task(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = task(x, y)
    assert out["output"].dtype == torch.bfloat16
    assert out["norm"].dtype == out["loss"].dtype == torch.float32
    torch.testing.assert_close(out["norm"], expected["norm"], rtol=0.05, atol=2e-3)
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_training_lowers_the_loss_and_widens_the_margins() -> None:
    x, y = batch(n=12)
    task = MarginTask(conv_net(), LargeMarginLoss(0.5), LAYERS)
    optimiser = torch.optim.Adam(task.parameters(), 0.01)
    first = task(x, y)
    for _ in range(60):
        optimiser.zero_grad()
        task(x, y)["loss"].backward()
        optimiser.step()
    last = task(x, y)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["distance"][..., 0].mean() > first["distance"][..., 0].mean()


class TestBatchNorm:
    def net(self, dropout: float = 0.0) -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        ).double()
        with torch.no_grad():
            net[1].running_mean.normal_()
            net[1].running_var.uniform_(0.5, 2)
        return net

    layers = ("input", "0", "1", "2")

    def test_batch_mode_measures_what_the_forward_computed_and_warns_once(self) -> None:
        net, (x, y) = self.net(), batch(dtype=torch.float64)
        task = MarginTask(net, LargeMarginLoss(), self.layers)
        with pytest.warns(UserWarning, match="batch norm in training mode couples the samples") as caught:
            out = task(x, y)
            task(x, y)
        assert len(caught) == 1
        leaf = x.clone().requires_grad_()
        z = copy.deepcopy(net)(leaf)
        gap = z.gather(1, out["competitor"]) - z.gather(1, y[:, None])
        (g,) = torch.autograd.grad(gap.sum(), leaf)
        torch.testing.assert_close(out["norm"][:, 0, 0], g.flatten(1).norm(dim=1))

    @pytest.mark.parametrize("net", [conv_net(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, 4))])
    def test_uncoupled_models_are_not_warned_about(self, net) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MarginTask(net.eval(), LargeMarginLoss())(*batch())
            MarginTask(conv_net().train(), LargeMarginLoss())(*batch())

    @pytest.mark.parametrize("second_order", [False, True])
    def test_frozen_mode_takes_norms_from_running_statistics_and_gaps_from_the_batch(self, second_order) -> None:
        net, (x, y) = self.net(), batch(dtype=torch.float64)
        loss = LargeMarginLoss(3.0, second_order=second_order)
        reference = copy.deepcopy(net)
        logits = reference(x)
        evaluated = MarginTask(copy.deepcopy(net).eval(), loss, self.layers)(x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = MarginTask(net, loss, self.layers, batchnorm="frozen")(x, y)
        torch.testing.assert_close(out["output"], logits, rtol=0, atol=0)
        torch.testing.assert_close(out["gap"], logits.gather(1, out["competitor"]) - logits.gather(1, y[:, None]))
        same = (out["competitor"] == evaluated["competitor"])[:, 0]
        assert same.sum() >= 3
        assert torch.equal(out["norm"][same], evaluated["norm"][same])
        for name, buffer in net.named_buffers():
            assert torch.equal(buffer, reference.get_buffer(name))
        assert all(module.training for module in net.modules())
        out["loss"].backward()

    def test_frozen_norms_are_the_gradients_of_single_samples(self) -> None:
        net, (x, y) = self.net(), batch(dtype=torch.float64)
        evaluated = copy.deepcopy(net).eval()
        out = MarginTask(net, LargeMarginLoss(), ("input", "0", "2"), batchnorm="frozen")(x, y)
        expected = norms_one_sample_at_a_time(evaluated, ("input", "0", "2"), out, x, y)
        torch.testing.assert_close(out["norm"], expected, rtol=1e-10, atol=1e-12)

    def test_frozen_mode_keeps_the_dropout_masks_and_the_random_state(self) -> None:
        net, (x, y) = self.net(dropout=0.5), batch(dtype=torch.float64)
        masks: list[Tensor] = []
        net[3].register_forward_hook(lambda module, args, output: masks.append(output == 0))
        torch.manual_seed(3)
        MarginTask(net, LargeMarginLoss(), self.layers, batchnorm="frozen")(x, y)
        after = torch.rand(1)
        assert len(masks) == 2 and torch.equal(masks[0], masks[1]) and masks[0].any()
        torch.manual_seed(3)
        net(x)
        assert torch.equal(torch.rand(1), after)

    def test_frozen_mode_costs_one_forward_where_nothing_is_coupled(self) -> None:
        net = self.net().eval()
        forwards: list[int] = []
        net.register_forward_hook(lambda *args: forwards.append(1))
        MarginTask(net, LargeMarginLoss(), self.layers, batchnorm="frozen")(*batch(dtype=torch.float64))
        assert len(forwards) == 1

    def test_frozen_mode_needs_running_statistics(self) -> None:
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
        with pytest.raises(ValueError, match='batchnorm="frozen" needs running statistics'):
            MarginTask(net, LargeMarginLoss(), batchnorm="frozen")(*batch())

    @pytest.mark.filterwarnings("ignore:batch norm in training mode")
    def test_second_order_in_eval_mode_and_in_training_mode(self) -> None:
        x, y = batch(dtype=torch.float64)
        for net in (self.net().eval(), self.net()):
            MarginTask(net, LargeMarginLoss(9.0, second_order=True), self.layers)(x, y)["loss"].backward()
            assert all(torch.isfinite(g).all() for g in stored_gradients(net))

    def test_synchronised_batch_norm_with_second_order_is_refused(self) -> None:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net())
        task = MarginTask(net, LargeMarginLoss(second_order=True), self.layers)
        with pytest.raises(ValueError, match="SyncBatchNorm in training mode cannot be differentiated twice"):
            task(*batch(dtype=torch.float64))
        task.eval()(*batch(dtype=torch.float64))["loss"].backward()


class TestRefusals:
    def test_a_compiled_model(self) -> None:
        sentence = "model must not be compiled, but .* is: compile the task, not the model"
        with pytest.raises(ValueError, match=sentence):
            MarginTask(torch.compile(conv_net(), backend="eager"), LargeMarginLoss())
        inside = conv_net()
        inside[2].compile(backend="eager")
        with pytest.raises(ValueError, match="its module '2' is"):
            MarginTask(inside, LargeMarginLoss())

    def test_data_parallel(self) -> None:
        with pytest.raises(ValueError, match="DataParallel is not supported: wrap the task in DistributedData"):
            MarginTask(nn.DataParallel(conv_net()), LargeMarginLoss())
        task = MarginTask(conv_net(), LargeMarginLoss())
        task._is_replica = True  # what DataParallel sets on the copies that it runs
        with pytest.raises(ValueError, match="DataParallel is not supported"):
            task(*batch())

    def test_unknown_options(self) -> None:
        with pytest.raises(ValueError, match='batchnorm must be one of "batch", "frozen", got \'eval\''):
            MarginTask(conv_net(), LargeMarginLoss(), batchnorm="eval")
        with pytest.raises(ValueError, match="layers has 'conv9', which names no module of Sequential"):
            MarginTask(conv_net(), LargeMarginLoss(), ("conv9",))
        with pytest.raises(TypeError, match=r"batch_dim must be a dimension or a dict .*, got 'first'"):
            MarginTask(conv_net(), LargeMarginLoss(), LAYERS, batch_dim="first")(*batch())
        with pytest.raises(ValueError, match=r"batch_dim must name taps \(input, 0, 3, 4, output\), got 'conv9'"):
            MarginTask(conv_net(), LargeMarginLoss(), LAYERS, batch_dim={"conv9": 0})(*batch())
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
            MarginTask(lambda x: x, LargeMarginLoss())
        with pytest.raises(TypeError, match=r"loss must be a loss of margin_kernels\.losses, got CrossEntropyLoss"):
            MarginTask(conv_net(), nn.CrossEntropyLoss())

    def test_targets_outside_the_classes(self) -> None:
        x, y = batch()
        with pytest.raises(ValueError, match=r"target must be in \[0, 4\)"):
            MarginTask(conv_net(), LargeMarginLoss())(x, y + CLASSES)


def test_explain_says_who_asked_for_a_strategy_and_what_a_search_costs() -> None:
    x, y = batch()
    found = MarginTask(conv_net(), LargeMarginLoss(top_k=2), LAYERS, "loop").explain(x, y)
    assert (found.strategy, found.reason) == ("loop", "asked for by passes='loop'")
    found = MarginTask(conv_net(), AdversarialMarginLoss(max_iter=7)).explain(x, y)
    assert (found.strategy, found.cost) == ("model", "F + 2 F, and up to 7 steps of DeepFool with their gradients")


class TestCopies:
    def test_the_state_dict_is_the_models_under_model(self) -> None:
        model = conv_net()
        task = MarginTask(model, LargeMarginLoss([1.0] * 5), LAYERS)
        task(*batch())
        assert list(task.state_dict()) == [f"model.{name}" for name in model.state_dict()]

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
    def test_a_copy_computes_the_same_before_and_after_a_step(self, duplicate) -> None:
        x, y = batch()
        task = MarginTask(conv_net(), LargeMarginLoss([1.0, 2.0, 1.0, 1.0, 1.0]), LAYERS)
        fresh = duplicate(task)
        expected = task(x, y)
        expected["loss"].backward()
        for other in (fresh, duplicate(task)):
            assert torch.equal(other(x, y)["distance"], expected["distance"])

    def test_the_model_is_left_without_hooks(self) -> None:
        model = conv_net()
        MarginTask(model, LargeMarginLoss(), LAYERS)(*batch())["loss"].backward()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


DISTRIBUTED = [
    (LargeMarginLoss(3.0, top_k=2, cross_entropy_weight=0.1), LAYERS),
    (LargeMarginLoss(3.0, top_k=2), LAYERS),
    (LargeMarginLoss(3.0, top_k=2, second_order=True, cross_entropy_weight=0.1), LAYERS),
    (MarginSensitivityLoss(2.0, power=1), None),
    (AdversarialMarginLoss(2.0, aggregation="avg"), None),
    (OneToNLoss(0.5, cross_entropy=True, across_processes=True), None),
    (OneToNLoss(0.5, bound="positive", across_processes=True), None),
]


def train_on_one_of_two(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, y = batch(dtype=torch.float64)
    part = slice(3 * rank, 3 * rank + 3)
    found = []
    for number, (loss, layers) in enumerate(DISTRIBUTED):
        model = conv_net().double()
        task = MarginTask(model, loss, layers)
        if number == 0:
            task.compile(backend="eager")
        wrapped = DistributedDataParallel(task)
        for _ in range(2):
            model.zero_grad()
            wrapped(x[part], y[part])["loss"].backward()
        found.append(stored_gradients(model))
    if rank == 0:
        torch.save(found, f"{file}.gradients")
    torch.distributed.barrier()
    # Gloo's threads outlive their process group and drop Python objects when they wake: they must not
    # meet an interpreter that is closing (PyTorch then aborts).
    os._exit(0)


def test_a_wrapped_model_is_refused(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(conv_net())
        for model, where in ((wrapped, "it"), (nn.Sequential(wrapped), "its module '0'")):
            with pytest.raises(ValueError, match=rf"must not be wrapped in Distributed.*{where} is: wrap the task"):
                MarginTask(model, LargeMarginLoss(gamma=1.0))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_gradient_of_the_whole_batch(tmp_path) -> None:
    file = str(tmp_path / "store")
    multiprocessing.spawn(train_on_one_of_two, (file,), nprocs=2)
    for (loss, layers), found in zip(DISTRIBUTED, torch.load(f"{file}.gradients"), strict=True):
        model = conv_net().double()
        MarginTask(model, loss, layers)(*batch(dtype=torch.float64))["loss"].backward()
        for a, b in zip(found, stored_gradients(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
