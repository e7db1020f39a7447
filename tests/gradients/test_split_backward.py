"""The split backward gives the gradients of the loop, for any network, and says where it cannot."""

import copy
from functools import partial

import pytest
import torch
from support import batches
from support.gradients import assert_split_is_as_exact_as_the_loop_under_autocast, is_split, step_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from margin_kernels import LargeMarginLoss, MarginSensitivityLoss, MarginTask
from margin_kernels.experiments import models
from margin_kernels.gradients import autograd_graph
from margin_kernels.testing import assert_same_gradients, flops

pytestmark = pytest.mark.skipif(autograd_graph.refusal() is not None, reason="the compiled extension is missing")

CLASSES = 5


class Shared(nn.Module):
    """One convolution and one linear layer used twice, a scale, and a weight made from another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.first(x))))))
        h = h.mean((2, 3))
        h = torch.tanh(self.norm(torch.tanh(self.fc(torch.tanh(self.fc(h))))))
        return self.scale * self.head(h)


class Residual(nn.Module):
    """In-place activations and a shortcut around the tapped block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.norm, self.head = nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        h = self.act(self.norm(self.block(h)) + h)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Tokens(nn.Module):
    """3-D linear layers, layer norm, a token of its own, attention over the tokens of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(2, 8, 2, stride=2), nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v))
        return self.head(F.gelu(self.norm(h)).mean(1))


class Words(nn.Module):
    """Indices as inputs: the tap is the embedding; the recurrent layer has many outputs and one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(20, 6), nn.GRUCell(6, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 7, dtype=self.head.weight.dtype)
        for step in self.embedding(x).unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.Tanh()) for c in (2, 4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


def plain() -> nn.Sequential:
    convolutions = nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convolutions, nn.Linear(24, 8), nn.Linear(8, CLASSES))


NETWORKS = {
    "plain": (plain, ("input", "0", "1", "3", "5", "output")),
    "late taps": (plain, ("3", "4")),
    "shared": (Shared, ("input", "first", "twice:1")),
    "residual": (Residual, ("input", "norm")),
    "around the tap": (Residual, ("block",)),
    "tokens": (Tokens, ("input", "qkv", "out")),
    "words": (Words, ("embedding",)),
    "checkpointed": (Checkpointed, ("input", "blocks.1")),
}


batch = partial(batches.normal, shape=(2, 6, 6), classes=CLASSES)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().to(dtype)


def gradients_of(name: str, loss: LargeMarginLoss, passes: str) -> list[Tensor | None]:
    """Those of one step of the network of this name, which reads images or words."""
    x, y = batch()
    if name == "words":
        x = torch.randint(20, (6, 3), generator=torch.Generator().manual_seed(1))
    return step_gradients(MarginTask(build(name), loss, NETWORKS[name][1], passes), x, y)


assert_same = partial(assert_same_gradients, least=4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_gradients_are_those_of_the_loop(name, top_k) -> None:
    loss = LargeMarginLoss(3.0, top_k=top_k, aggregation="sum")
    assert_same(gradients_of(name, loss, "split"), gradients_of(name, loss, "loop"))


SOFT = {"competitors": "soft", "cross_entropy_weight": 0.7}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradients_of_soft_margin_and_cross_entropy_are_those_of_the_loop(name) -> None:
    loss = LargeMarginLoss(3.0, **SOFT)
    assert_same(gradients_of(name, loss, "split"), gradients_of(name, loss, "loop"))


@pytest.mark.parametrize(
    "options",
    [
        {**SOFT, "p": "inf", "alpha": 2.0},
        {**SOFT, "p": 1, "margin_weight": 0.3, "class_weight": [1.0, 2.0, 0.5, 0.0][:CLASSES] + [1.0] * (CLASSES - 4)},
        {**SOFT, "ignore_index": 1, "reduction": "none"},
        {**SOFT, "ignore_index": 0, "class_weight": [1.5] * CLASSES, "reduction": "sum"},
        {"top_k": 2, "ignore_index": 0, "class_weight": [1.5] * CLASSES},
        {"p": "inf", "aggregation": "max", "top_k": 3, "alpha": 2.0},
        {"p": 1, "aggregation": "mean_distance", "top_k": 2, "margin_weight": 0.3},
        {"top_k": CLASSES - 1, "cross_entropy_weight": 0.7},
        {"top_k": 2, "cross_entropy_weight": 0.7, "auxiliary": "pairwise"},
        {"reduction": "none", "top_k": 2, "aggregation": "mean"},
        {"reduction": "sum", "layer_scale": "numel", "gamma": 300.0},
    ],
    ids=str,
)
def test_every_option_gives_the_gradients_of_the_loop(options) -> None:
    loss = LargeMarginLoss(**{"gamma": 3.0, **options})
    assert_same(gradients_of("plain", loss, "split"), gradients_of("plain", loss, "loop"))


def test_values_and_statistics_are_those_of_the_loop() -> None:
    loss = LargeMarginLoss(3.0, top_k=2)
    x, y = batch()
    split, loop = (MarginTask(build("plain"), loss, NETWORKS["plain"][1], passes)(x, y) for passes in ("split", "loop"))
    assert split.keys() == loop.keys() and is_split(split["loss"])
    for name, value in split.items():
        assert torch.equal(value, loop[name])


def test_the_pairwise_loss_is_the_logistic_loss_of_the_label_and_its_best_competitor() -> None:
    z = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, -1.0]], requires_grad=True)
    y = torch.tensor([0, 2])
    loss = LargeMarginLoss(margin_weight=0.0, cross_entropy_weight=2.0, auxiliary="pairwise")
    expected = 2 * (torch.log1p(torch.exp(torch.tensor([-1.0, 4.0])))).mean()
    torch.testing.assert_close(loss(z, y, [z]), expected)


@pytest.mark.parametrize("options", [{}, SOFT], ids=str)
def test_a_step_does_the_work_of_cross_entropy(options) -> None:
    """(k + 2) F where the loop has (k + 3) F, but for the first convolution, whose input gradient only a pass needs."""
    x, y = torch.rand(4, 1, 28, 28), torch.randint(10, (4,))
    model = models.build("mnist_cnn", (1, 28, 28), 10)

    def step(passes: str):
        task = MarginTask(model, LargeMarginLoss(1e3, **options), ("pool1", "pool2"), passes)
        task(x, y)["loss"].backward()  # tried out
        return lambda: task(x, y)["loss"].backward()

    forward = flops(lambda: model(x))
    cross_entropy = flops(lambda: F.cross_entropy(model(x), y).backward())
    assert flops(step("split")) == pytest.approx(cross_entropy, rel=0.002)
    assert flops(step("loop")) > cross_entropy + 0.7 * forward


def test_hooks_accumulation_and_a_second_backward_see_ordinary_gradients() -> None:
    x, y = batch()
    model = build("shared")
    task = MarginTask(model, LargeMarginLoss(3.0), NETWORKS["shared"][1], "split")
    calls: list[str] = []
    model.fc.weight.register_hook(lambda grad: calls.append("tensor") or 2 * grad)
    model.fc.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    loss = task(x, y)["loss"]
    loss.backward(retain_graph=True)
    assert calls == ["tensor", "accumulated"]
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, before in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * before)
    expected = gradients_of("shared", LargeMarginLoss(3.0), "loop")
    for (name, _), before, other in zip(model.named_parameters(), once, expected, strict=True):
        torch.testing.assert_close(before, other * (2 if name == "fc.weight" else 1) / 3, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_graph_is_left_as_it_was() -> None:
    """A term of the user's on the logits still reaches every parameter, and the input where it asks for a gradient."""
    x, y = batch()
    results = []
    for passes in ("split", "loop"):
        model, leaf = build("residual"), x.clone().requires_grad_()
        out = MarginTask(model, LargeMarginLoss(3.0), ("input", "norm"), passes)(leaf, y)
        out["loss"].backward(retain_graph=True)
        (out["output"].square().sum() + out["loss"]).backward()
        results.append([leaf.grad, *(parameter.grad for parameter in model.parameters())])
    assert_same(*results)


def test_frozen_parameters_and_odd_batches() -> None:
    for n in (1, 5):
        results = []
        for passes in ("split", "loop"):
            model = build("plain")
            model[0].requires_grad_(False)
            model[5].bias.requires_grad_(False)
            MarginTask(model, LargeMarginLoss(3.0), ("input", "3"), passes)(*batch(n=n))["loss"].backward()
            assert model[0].weight.grad is None and model[5].bias.grad is None
            results.append([p.grad for p in model.parameters() if p.requires_grad])
        assert_same(*results)


@pytest.mark.parametrize("top_k", [1, 2])
def test_channels_last_and_accumulation_over_two_batches(top_k) -> None:
    results = []
    for passes in ("split", "loop"):
        model = build("residual").to(memory_format=torch.channels_last)
        task = MarginTask(model, LargeMarginLoss(3.0, top_k=top_k, aggregation="sum"), ("input", "norm"), passes)
        for n in (6, 4):
            x, y = batch(n=n)
            task(x.to(memory_format=torch.channels_last), y)["loss"].backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 2, "aggregation": "sum"}, SOFT], ids=str)
def test_autocast(options, dtype) -> None:
    x, y = batch(dtype=torch.float32)
    assert_split_is_as_exact_as_the_loop_under_autocast(
        lambda: build("plain", torch.float32),
        LargeMarginLoss(3.0, **options),
        ("input", "3"),
        x,
        y,
        dtype,
    )


def test_nan_in_one_sample_reaches_the_loss() -> None:
    x, y = batch()
    x[2] = float("nan")
    task = MarginTask(build("plain"), LargeMarginLoss(3.0), ("input",), "split")
    loss = task(x, y)["loss"]
    loss.backward()
    assert loss.isnan() and task.model[0].weight.grad.isnan().any()


class Coupled(nn.Module):
    """Every sample sees the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x[:, 0, 0]))
        return self.head(torch.tanh(h - h.mean(0)))


class TokensFirst(nn.Module):
    """[T,N,D] with parameters there; with as many tokens as samples the shape does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x[:, 0].transpose(0, 1))).mean(0))


@pytest.mark.parametrize("n", [4, 6])
def test_time_major_layers_are_exact_whatever_the_number_of_steps(n) -> None:
    """[T,N,D] with T = 6: the graph shows the batch in dimension 1, at n = 6 too."""
    found = []
    for passes in ("auto", "loop"):
        torch.manual_seed(0)
        model = TokensFirst().double()
        task = MarginTask(model, LargeMarginLoss(3.0), ("input", "norm"), passes)
        out = task(*batch(n=n))
        out["loss"].backward()
        found.append([parameter.grad for parameter in model.parameters()])
        assert is_split(out["loss"]) == (passes == "auto")
        # The norm at the layer, sample by sample.
        for i in range(n):
            x, y = batch(n=n)
            alone = task(x[i : i + 1], y[i : i + 1])
            torch.testing.assert_close(out["norm"][i], alone["norm"][0], rtol=1e-9, atol=1e-11)
    assert_same(*found)


def batchnorm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES))


@pytest.mark.filterwarnings("ignore:batch norm in training mode")
@pytest.mark.parametrize(
    ("model", "options", "n", "message"),
    [
        (Coupled, {}, 6, "the samples are coupled"),
        (
            plain,
            {"space": "probability"},
            6,
            'the passes of space="probability" do not hold the gradients of the logits',
        ),
        (batchnorm, {}, 6, "batch norm in training mode couples the samples"),
        (plain, {"second_order": True}, 6, "TanhBackward0 is not known to be linear in the activations"),
        (plain, {"cross_entropy_weight": 1.0}, 6, "the gradient of the cross-entropy is not among those of the passes"),
        (
            plain,
            {"cross_entropy_weight": 1.0, "auxiliary": "pairwise", "space": "probability"},
            6,
            'space="probability" do not hold the gradients of the logits',
        ),
    ],
)
def test_what_is_not_exact_is_refused_by_name_and_avoided_by_auto(model, options, n, message) -> None:
    torch.manual_seed(0)
    model = model().double()
    x, y = batch(n=n)
    loss = LargeMarginLoss(3.0, **options)
    task = MarginTask(model, loss, ("input",), "split")
    for _ in range(2):
        with pytest.raises(ValueError, match=f'passes="split" is not possible: .*{message}'):
            task(x, y)
    found = []
    for passes in ("auto", "loop"):
        fresh = copy.deepcopy(model)
        MarginTask(fresh, loss, ("input",), passes)(x, y)["loss"].backward()
        found.append([parameter.grad for parameter in fresh.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_more_reasons_against_it(monkeypatch) -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="no tap needs a pass"):
        MarginTask(plain().double(), LargeMarginLoss(), ("output",), "split")(x, y)
    with pytest.raises(ValueError, match='classification="hinge" and top_k=1'):
        MarginTask(plain().double(), MarginSensitivityLoss(), ("input",), "split")(x, y)
    with pytest.raises(ValueError, match=r'a forward pass of their own \(batchnorm="frozen"\)'):
        MarginTask(batchnorm().double(), LargeMarginLoss(), ("input",), "split", batchnorm="frozen")(x, y)
    hooked = plain().double()
    hooked[2].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    with pytest.raises(ValueError, match=r"an activation has a hook \(BackwardHookFunctionBackward\)"):
        MarginTask(hooked, LargeMarginLoss(), ("input",), "split")(x, y)
    monkeypatch.setattr(autograd_graph, "refusal", lambda: "the compiled extension is missing")
    with pytest.raises(ValueError, match="the compiled extension is missing"):
        MarginTask(plain().double(), LargeMarginLoss(), ("input",), "split")(x, y)
    assert MarginTask(plain().double(), LargeMarginLoss(), ("input",))(x, y)["loss"].requires_grad


def test_batch_norm_in_evaluation_mode_is_exact() -> None:
    found = []
    for passes in ("split", "loop"):
        torch.manual_seed(0)
        model = batchnorm().double().eval()
        MarginTask(model, LargeMarginLoss(3.0), ("input",), passes)(*batch())["loss"].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_same(*found)


def test_attention_layers_of_pytorch_batch_first() -> None:
    """nn.MultiheadAttention works on [T,N,D] inside: refused, or exact."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).double()
    model = nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(72, CLASSES)).double()
    with sdpa_kernel(SDPBackend.MATH):
        results = []
        for passes in ("auto", "loop"):
            fresh = copy.deepcopy(model)
            MarginTask(fresh, LargeMarginLoss(3.0), ("input",), passes)(*batch())["loss"].backward()
            results.append([parameter.grad for parameter in fresh.parameters()])
    assert_same(*results)


def test_a_second_derivative_is_refused() -> None:
    model = build("plain")
    loss = MarginTask(model, LargeMarginLoss(3.0), ("input",), "split")(*batch())["loss"]
    with pytest.raises(RuntimeError, match="the split backward has no second derivative"):
        torch.autograd.grad(loss, model[0].weight, create_graph=True)
