"""Where the gradients are taken: names, in-place operations, reused and frozen layers, checkpointing, the head."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from margin_kernels import LargeMarginLoss, MarginTask
from margin_kernels.gradients.autograd_graph import same_edge
from margin_kernels.gradients.request import Captured
from margin_kernels.task.capture import Taps, resolve


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


TARGET = torch.tensor([0, 2, 1])


def conv_net(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(inplace),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


def measure(model: nn.Module, layers, x: Tensor, **options) -> dict[str, Tensor]:
    return MarginTask(model, LargeMarginLoss(5.0, top_k=2, **options), layers)(x, TARGET)


def parameter_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


class TestNames:
    model = nn.ModuleDict(
        {
            "layer3": nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))),
            "conv1": nn.Linear(2, 2),
            "conv2": nn.Linear(2, 2),
        }
    )

    def test_a_star_stays_within_one_part_of_the_name(self) -> None:
        assert resolve(self.model, ["layer3.*"]) == ("layer3.0", "layer3.1")

    def test_two_stars_cross_dots(self) -> None:
        assert resolve(self.model, ["layer3.**"]) == ("layer3.0", "layer3.0.0", "layer3.1", "layer3.1.0")

    def test_a_question_mark_is_one_character(self) -> None:
        assert resolve(self.model, ["conv?"]) == ("conv1", "conv2")

    def test_order_is_the_callers_and_each_name_comes_once(self) -> None:
        names = resolve(self.model, ["output", "conv2", "conv*", "conv2", "input"])
        assert names == ("output", "conv2", "conv1", "input")

    def test_one_name_needs_no_list(self) -> None:
        assert resolve(self.model, "conv1") == ("conv1",)

    @pytest.mark.parametrize(
        ("layers", "sentence"),
        [
            (["convl"], r"layers has 'convl', which names no module of ModuleDict; close names: conv[12], conv[12]"),
            (["zzz*"], "layers has 'zzz\\*', which names no module of ModuleDict; known: input, output, layer3"),
            (["conv1:x"], "layers has 'conv1:x': a call of a reused module is written \"name:index\""),
            ([], "layers must name at least one tap"),
        ],
    )
    def test_a_wrong_name_is_shown_with_close_ones(self, layers, sentence) -> None:
        with pytest.raises(ValueError, match=sentence):
            resolve(self.model, layers)

    def test_names_must_be_strings(self) -> None:
        with pytest.raises(TypeError, match="layers must be names, got int"):
            resolve(self.model, [1])


class TestInPlace:
    def test_an_in_place_relu_does_not_move_the_tap_before_it(self) -> None:
        layers, x = ("input", "0", "1", "2", "3"), images()
        plain, inplace = conv_net(), conv_net(inplace=True)
        expected, actual = measure(plain, layers, x), measure(inplace, layers, x)
        # Norms before and after the ReLU differ: a tap that had moved would show the later one.
        assert not torch.equal(expected["norm"][..., 1], expected["norm"][..., 2])
        assert torch.equal(actual["norm"], expected["norm"])
        pairs = zip(
            parameter_gradients(plain, expected["loss"]), parameter_gradients(inplace, actual["loss"]), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_an_in_place_change_of_a_tapped_view_does_not_move_the_tap(self) -> None:
        class Squash(nn.Module):
            def __init__(self, inplace: bool) -> None:
                super().__init__()
                self.body, self.flat, self.act = nn.Conv2d(1, 3, 3), nn.Flatten(), nn.ReLU(inplace)
                self.head = nn.Linear(48, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.act(self.flat(self.body(x))))

        plain = Squash(False).double()
        inplace = Squash(True).double()
        inplace.load_state_dict(plain.state_dict())
        layers, x = ("input", "body", "flat", "act"), images()
        assert torch.equal(measure(inplace, layers, x)["norm"], measure(plain, layers, x)["norm"])

    def test_an_in_place_change_of_the_input_stays_legal(self) -> None:
        class Centre(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.sub_(0.5))

        x = images()
        expected = measure(conv_net(), ("input",), x - 0.5)["norm"]
        found = measure(Centre(*conv_net()), ("input",), x.clone())["norm"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    def test_a_residual_in_place_addition_does_not_move_the_tap(self) -> None:
        class Block(nn.Module):
            def __init__(self, inplace: bool) -> None:
                super().__init__()
                self.inplace, self.f, self.head = inplace, nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                out = self.f(x)
                out = out.add_(x) if self.inplace else out + x
                return self.head(out.relu_() if self.inplace else out.relu())

        plain, inplace = Block(False), Block(True)
        inplace.load_state_dict(plain.state_dict())
        x = torch.randn(3, 4)
        assert torch.equal(measure(inplace, ("input", "f"), x)["norm"], measure(plain, ("input", "f"), x)["norm"])


class Twice(nn.Module):
    """One activation module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.act(self.first(x)))))


class TestReusedModules:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))

    def test_an_index_names_one_call(self) -> None:
        model = Twice()
        sequence = nn.Sequential(model.first, nn.Tanh(), model.second, nn.Tanh(), model.head)
        actual = measure(model, ("act:1", "act:0", "input"), self.x)["norm"]
        assert torch.equal(actual, measure(sequence, ("3", "1", "input"), self.x)["norm"])

    def test_without_an_index_the_calls_are_listed(self) -> None:
        with pytest.raises(ValueError, match="layer 'act' was called 2 times in one forward pass: name one of"):
            measure(Twice(), ("act",), self.x)
        with pytest.raises(ValueError, match='"act:0", "act:1"'):
            measure(Twice(), ("act", "act:0"), self.x)

    def test_a_call_that_did_not_happen_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="layer 'act:2': 'act' was called 2 times in this forward pass"):
            measure(Twice(), ("act:2",), self.x)
        with pytest.raises(ValueError, match="layer 'unused' was not called in this forward pass"):
            measure(Twice(), ("unused",), self.x)


class TestFrozenStems:
    def test_a_frozen_layer_is_measured_like_a_trained_one(self) -> None:
        for inplace in (False, True):
            model, x = conv_net(inplace), images()
            layers = ("0", "1", "3", "output")
            expected = measure(model, layers, x)
            free = parameter_gradients(model, expected["loss"])
            model[0].requires_grad_(False)
            actual = measure(model, layers, x)
            assert torch.equal(actual["norm"], expected["norm"])
            for g, e in zip(parameter_gradients(model, actual["loss"]), free[2:], strict=True):
                torch.testing.assert_close(g, e)

    def test_a_frozen_head_keeps_its_closed_form(self) -> None:
        model, x = conv_net(), images()
        expected = measure(model, ("4", "output"), x)["norm"]
        model[5].requires_grad_(False)
        assert torch.equal(measure(model, ("4", "output"), x)["norm"], expected)

    def test_the_callers_input_is_left_as_it_was(self) -> None:
        x = images()
        measure(conv_net(), ("input",), x)["loss"].backward()
        assert not x.requires_grad and x.grad is None

    def test_an_input_that_requires_grad_gets_the_gradient_of_the_loss(self) -> None:
        model, x = conv_net(), images().requires_grad_()
        out = measure(model, ("input",), x)
        out["loss"].backward()
        z = model(x)
        gap = z.gather(1, out["competitor"]) - z.gather(1, TARGET[:, None])
        terms = (5.0 + gap[..., None] / (1e-6 + out["norm"])).clamp(min=0)
        (expected,) = torch.autograd.grad(terms.max(1).values.mean(), x)
        torch.testing.assert_close(x.grad, expected)

    def test_layers_under_no_grad_are_refused(self) -> None:
        class Stem(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    x = self.stem(x)
                return self.head(x)

        with pytest.raises(ValueError, match="layer 'stem' runs without gradients"):
            measure(Stem(), ("stem",), torch.randn(3, 4))
        with pytest.raises(ValueError, match="tap 'input' is outside the graph of the logits"):
            measure(Stem(), ("input",), torch.randn(3, 4))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = conv_net(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.net[:4], x, use_reentrant=self.reentrant)
        return self.net[4:](hidden)


class TestCheckpointing:
    layers = ("input", "net.0", "net.1", "net.2", "output")

    @pytest.mark.parametrize("second_order", [False, True])
    def test_recomputation_keeps_the_first_capture(self, second_order) -> None:
        plain, x = Checkpointed(False), images()
        out = measure(plain, self.layers, x, second_order=second_order)
        layers = ("input", "0", "1", "2", "output")
        expected = measure(plain.net, layers, x, second_order=second_order)
        assert torch.equal(out["norm"], expected["norm"])
        pairs = zip(
            parameter_gradients(plain, out["loss"]), parameter_gradients(plain.net, expected["loss"]), strict=True
        )
        for actual, wanted in pairs:
            torch.testing.assert_close(actual, wanted)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    @pytest.mark.parametrize("layers", [("net.0",), ("input",)])
    def test_reentrant_checkpointing_is_refused(self, layers) -> None:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            measure(Checkpointed(True), layers, images())


class Returns(nn.Module):
    """A layer that returns something other than one floating-point tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 3)
        self.layer = nn.Module()
        self.layer.forward = lambda x: (
            (x.long(), x) if kind == "tuple" else x.long() if kind == "integers" else {"x": x}
        )

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.head(x)


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "shown"), [("tuple", "torch.int64"), ("integers", "torch.int64"), ("dict", "dict")]
    )
    def test_a_tap_must_return_one_floating_point_tensor(self, kind, shown) -> None:
        with pytest.raises(ValueError, match=f"layer 'layer' returns .*{shown}; a tap must be a floating-point tensor"):
            measure(Returns(kind), ("layer",), torch.randn(3, 4))

    def test_token_ids_cannot_be_tapped(self) -> None:
        model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
        tokens = torch.randint(7, (3, 2))
        with pytest.raises(
            ValueError, match=r'"input" needs a floating-point input, got torch\.int64: tap the embedding'
        ):
            measure(model, ("input",), tokens)
        assert measure(model, ("0",), tokens)["norm"].shape == (3, 2, 1)

    def test_the_input_must_be_a_tensor_to_be_tapped(self) -> None:
        with pytest.raises(ValueError, match='"input" needs a tensor as the model\'s input, got str'):
            measure(nn.Identity(), ("input",), ["an image"])

    def test_the_model_must_return_its_logits(self) -> None:
        model = Returns("tuple")
        model.forward = lambda x: (model.head(x), x)
        with pytest.raises(ValueError, match=r"model must return its logits as one tensor \[N,C\], got a tuple of 2"):
            measure(model, ("output",), torch.randn(3, 4))

    def test_a_tap_may_hold_the_batch_elsewhere(self) -> None:
        class TimeFirst(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.body(x.transpose(0, 1)).mean(0))

        x = torch.randn(3, 5, 4)
        net = TimeFirst()
        measured = measure(net, ("body",), x)["norm"]
        for i in range(3):  # the batch is dimension 1 there, and the graph shows it
            alone = MarginTask(net, LargeMarginLoss(5.0, top_k=2), ("body",))(x[i : i + 1], TARGET[i : i + 1])
            torch.testing.assert_close(measured[i], alone["norm"][0])

    def test_no_hook_stays_behind_after_an_error(self) -> None:
        model = conv_net()
        with pytest.raises(RuntimeError):
            measure(model, ("input", "0", "3"), images()[:, :, :2])
        assert not any(module._forward_hooks for module in model.modules())


def head_of(model: nn.Module, x: Tensor, layers=("input",)) -> Captured:
    return Taps(model, layers).capture(model, x)


class TestHead:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))

    def test_it_is_the_linear_module_that_makes_the_logits(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
        head = head_of(model, self.x).head
        assert head is not None and head.weight is model[2].weight

    @pytest.mark.parametrize(
        "after",
        [nn.LogSoftmax(1), nn.ReLU(inplace=True), nn.Unflatten(1, (3, 1))],
        ids=["another layer", "in-place", "view"],
    )
    def test_there_is_none_where_the_logits_change_after_it(self, after) -> None:
        assert head_of(nn.Sequential(nn.Linear(4, 3), after), self.x).head is None

    def test_there_is_none_for_a_subclass(self) -> None:
        class Cosine(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(nn.functional.normalize(x))

        assert head_of(nn.Sequential(Cosine(4, 3)), self.x).head is None

    def test_there_is_none_where_a_hook_changes_its_output(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        model[0].register_forward_hook(lambda module, args, output: output * 2)
        assert head_of(model, self.x).head is None

    def test_there_is_none_where_its_forward_was_replaced(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        original = model[0].forward
        model[0].forward = lambda x: original(x * x)
        assert head_of(model, self.x).head is None

    def test_there_is_none_for_token_logits(self) -> None:
        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x[:, None, :]).flatten(1)

        assert head_of(Pooled(), self.x).head is None

    def test_a_head_that_stops_being_one_is_noticed(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        taps = Taps(model, ("input",))
        assert taps.capture(model, self.x).head is not None
        model[1].register_forward_hook(lambda module, args, output: output * 2)
        assert taps.capture(model, self.x).head is None

    @pytest.mark.parametrize("name", ["maximum", "convolution", "then tanh", "another name"])
    def test_another_module_in_the_place_of_head_or_pooling_is_noticed(self, name) -> None:
        pools = {
            "maximum": nn.AdaptiveMaxPool2d(1),
            "convolution": nn.Conv2d(3, 3, 4),
            "then tanh": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Tanh()),
        }
        torch.manual_seed(0)
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), pooled, nn.Linear(3, 3)).double()
        task = MarginTask(model, LargeMarginLoss(), ("1",))
        task(images(), TARGET)
        if name in pools:
            pooled[0] = pools[name].double()
        else:
            model.add_module("head", model.pop(3))
        found = task(images(), TARGET)
        h = model[:2](images()).detach().requires_grad_()
        z = model[2:](h)
        columns = torch.stack([found["competitor"][:, 0], TARGET])
        gap = z.gather(1, columns[:1].T) - z.gather(1, columns[1:].T)
        norm = torch.autograd.grad(gap.sum(), h)[0].flatten(1).norm(dim=1)
        torch.testing.assert_close(found["norm"].flatten(), norm, rtol=1e-12, atol=0)

    def test_pooling_is_found_through_views_and_not_through_dropout(self) -> None:
        for between, found in ((nn.Identity(), True), (nn.Dropout(0.5), False)):
            model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), between, nn.Linear(4, 3))
            captured = head_of(model, torch.randn(3, 1, 6, 6), ("0",))
            assert captured.head is not None
            assert (captured.head.pooled is not None) is found
            if captured.head.pooled is not None:
                assert captured.head.positions == 16 and same_edge(captured.head.pooled, captured.taps[0].edge)

    def test_pooling_to_more_than_one_position_is_none(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        captured = head_of(model, torch.randn(3, 1, 6, 6), ("0",))
        assert captured.head is not None and captured.head.pooled is None

    def test_a_copy_of_the_model_is_measured_with_its_own_head(self) -> None:
        task = MarginTask(nn.Sequential(nn.Linear(4, 3)), LargeMarginLoss(top_k=2), ("input",))
        before = task(self.x, TARGET)["norm"]
        twin = copy.deepcopy(task)
        with torch.no_grad():
            twin.model[0].weight.mul_(2)
        torch.testing.assert_close(twin(self.x, TARGET)["norm"], 2 * before)
        assert torch.equal(task(self.x, TARGET)["norm"], before)
