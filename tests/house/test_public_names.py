"""What `dir` and `import *` show: the public names, all of which exist and are documented, and nothing besides."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import margin_kernels as mk
from margin_kernels import reference


@pytest.mark.parametrize("module", [mk, mk.functional], ids=["margin_kernels", "functional"])
def test_only_public_names_are_shown(module):
    assert dir(module) == sorted(module.__all__)
    shown: dict[str, object] = {}
    exec(f"from {module.__name__} import *", shown)
    assert set(shown) - {"__builtins__"} == set(module.__all__)
    for name in set(dir(module)) - {"__version__"}:
        assert inspect.getdoc(getattr(module, name)), name


def test_every_op_is_public_and_what_is_public_besides_is_what_an_op_returns():
    assert set(mk.functional.__all__) - set(reference.__all__) == {"Competitors", "DeepFoolStep"}
    assert set(reference.__all__) <= set(mk.functional.__all__)


def test_what_is_imported_on_the_way_can_be_reached_and_is_not_shown():
    assert "losses" not in dir(mk) and inspect.ismodule(mk.losses)
    assert "Tensor" not in dir(mk.functional) and callable(mk.functional.hinge_of)


def _options() -> list[tuple[str, Callable[..., Any], dict[str, Any], str]]:
    """Every option of a public class or function that takes words: whose, what is called, with what, and its name."""
    model, x, y = nn.Sequential(nn.Linear(5, 4)), torch.randn(6, 5), torch.randint(4, (6,))
    z, task = torch.randn(6, 4), mk.MarginTask(model, mk.LargeMarginLoss())
    losses = (mk.LargeMarginLoss, mk.MarginSensitivityLoss, mk.AdversarialMarginLoss, mk.OneToNLoss)
    calls: dict[Callable[..., Any], dict[str, Any]] = {
        **{loss: {} for loss in losses},
        mk.MarginTask: {"model": model, "loss": mk.LargeMarginLoss()},
        mk.MarginMonitor: {"model": model, "layers": ("0",)},
        mk.deepfool: {"model": model, "x": x},
        mk.suggest_gamma: {"task": task, "loader": [(x, y)]},
        mk.functional.competitors: {"logits": z, "target": y},
        mk.functional.dual_norm: {"gradients": [torch.randn(6, 2, 3)]},
        mk.functional.row_distance: {"rows": torch.randn(4, 3), "index": (y[:, None] + 1) % 4, "target": y},
        mk.functional.margin_hinge: {"gap": torch.randn(6, 1), "norm": torch.rand(6, 1, 2), "gamma": 1.0},
        mk.functional.one_to_n: {"logits": z, "target": y},
        mk.functional.deepfool_step: {"gap": torch.randn(6, 1), "gradients": torch.randn(6, 1, 3)},
    }
    # Names of the user's own, which no error can list.
    own = ("layers", "output", "Mapping", "Callable")
    found = []
    for call, given in calls.items():
        for name, parameter in inspect.signature(call).parameters.items():
            kind = str(parameter.annotation)
            takes_words = re.search(r"\bstr\b", kind) or name == "process_group"
            if takes_words and name not in own and not any(word in kind for word in own):
                found.append((call.__name__, call, given, name))
    return found


OPTIONS = _options()


@pytest.mark.parametrize(("who", "call", "given", "name"), OPTIONS, ids=[f"{o[0]}-{o[3]}" for o in OPTIONS])
def test_the_error_of_an_unknown_word_names_every_word_that_is_known(who, call, given, name):
    """The words that are tried are all that stand in quotes in the docstrings and defaults of this package."""
    words = {"auto", "inf", "world"} | {word for o in OPTIONS for word in re.findall(r'"(\w+)"', inspect.getdoc(o[1]))}
    words |= {p.default for o in OPTIONS for p in inspect.signature(o[1]).parameters.values() if type(p.default) is str}
    unknown = "automatic"
    assert unknown not in words and len(words) > 25
    with pytest.raises((TypeError, ValueError)) as refused:
        call(**{**given, name: unknown})
    said = str(refused.value)
    assert said.startswith(f"{name} must be ") and (unknown in said or "got str" in said)
    for word in words:
        try:
            call(**{**given, name: word})
        except Exception as error:
            if str(error).partition(", got")[0] == said.partition(", got")[0]:
                continue  # refused as the unknown one was, not for other options or this machine
        assert re.search(rf"\b{word}\b", said), f"{word} is taken"


def test_there_are_options_that_take_words():
    assert len(OPTIONS) > 35
