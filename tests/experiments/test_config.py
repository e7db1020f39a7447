"""A run is described by a file and overrides; what does not fit is refused by name."""

import dataclasses
import inspect
import math

import pytest
import yaml
from support import resolved

import margin_kernels as mk
from margin_kernels.experiments import config
from margin_kernels.experiments.config import ConfigError

NAMES = config.keys()


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("loss:\n  kind: large_margin\n  gamma: [1, 2.5]\n  p: inf\ntraining:\n  epochs: 3\n  seed: 4\n")
    parsed = config.parse(["--config", str(path), "--training.epochs", "7", "--loss.top_k=2"])
    assert (parsed.training.epochs, parsed.training.seed, parsed.loss.top_k) == (7, 4, 2)
    assert parsed.loss.gamma == [1.0, 2.5] and config.exponent(parsed.loss.p) == math.inf
    assert parsed.optimiser == config.OptimiserConfig()


def test_the_resolved_config_reads_back_the_same(tmp_path):
    parsed = config.parse(["--loss.p", "inf", "--loss.gamma", "[0.5,2]", "--schedule.milestones", "[3,5]"])
    assert config.from_dict(config.to_dict(parsed)) == parsed
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(parsed))
    assert config.parse(["--config", str(path)]) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss:\n  gama: 2\n", "unknown key 'loss.gama'; did you mean loss.gamma"),
        ("epochs: 2\n", "unknown key 'epochs'; did you mean training.epochs"),
        ("optimizer:\n  lr: 1\n", "unknown key 'optimizer'"),
        ("- 1\n", "must be a mapping of keys to values, got list"),
    ],
)
def test_unknown_keys_in_a_file_raise_with_close_names(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.parse(["--config", str(path)])
    assert "bad.yaml" in str(caught.value)


def test_unknown_overrides_and_wrong_values_raise():
    with pytest.raises(ConfigError, match=r"unknown key 'training.epoch'; did you mean training.epochs"):
        config.parse(["--training.epoch", "3"])
    with pytest.raises(ConfigError, match=r"training.epochs"):
        config.parse(["--training.epochs", "many"])
    with pytest.raises(ConfigError, match=r"no such file, and not one of the shipped configs: .*mnist_large_margin_l2"):
        config.parse(["--config", "mnist_large_margin_l3"])


@pytest.mark.parametrize("name", sorted(config.shipped()))
def test_shipped_configs_parse_and_build(name):
    from margin_kernels.experiments import models, objectives

    parsed = config.parse(["--config", name])
    assert parsed.name == name
    resolved.check(f"config {name}", [parsed])
    shape = {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}.get(parsed.data.name, (1, 28, 28))
    model = models.build(parsed.model.name, shape, 10)
    task = objectives.build(model, parsed.loss, models.hidden_taps(parsed.model.name))
    if parsed.loss.kind == "large_margin" and isinstance(parsed.loss.gamma, list):
        assert len(parsed.loss.gamma) == len(task.layers)


def test_shipped_configs_are_found_by_name_and_by_repository_path():
    path = config.shipped()["mnist_large_margin_l2"]
    for name in (
        "mnist_large_margin_l2",
        "mnist_large_margin_l2.yaml",
        "configs/mnist_large_margin_l2.yaml",
        str(path),
    ):
        assert config.find(name).resolve() == path.resolve()


def sections(part):
    """The dataclasses that a config is made of."""
    found = [part]
    for field in dataclasses.fields(part):
        if dataclasses.is_dataclass(getattr(part, field.name)):
            found += sections(getattr(part, field.name))
    return found


def test_every_field_is_an_option_and_documented():
    _, *parts = sections(config.Config())
    assert len(parts) > 10
    for part in parts:
        for field in dataclasses.fields(part):
            assert f"{field.name}:" in str(type(part).__doc__), (type(part).__name__, field.name)
            assert any(key.split(".")[-1] == field.name or f".{field.name}." in key for key in NAMES), field.name
    assert set(yaml.safe_load(config.to_yaml(config.Config()))) == {key.split(".")[0] for key in NAMES}


# section -> the part of the library whose options it holds
LIBRARY = {
    "loss": (mk.LargeMarginLoss, mk.MarginTask),
    "loss.sensitivity": (mk.MarginSensitivityLoss,),
    "loss.adversarial": (mk.AdversarialMarginLoss,),
    "loss.one_to_n": (mk.OneToNLoss,),
}
# option -> why its default is not that of the library, in words of its help
DIFFERENT = {
    "loss.layers": "MarginTask, which knows no hidden layers, has the input alone",
    "loss.one_to_n.weight_norm": "by the norm of its weight row",  # a switch: the library is given the layer
}


@pytest.mark.parametrize("section", LIBRARY)
def test_defaults_are_those_of_the_library(section):
    part = config.Config()
    for name in section.split("."):
        part = getattr(part, name)
    own = {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
    compared = set()
    for owner in LIBRARY[section]:
        for name, parameter in inspect.signature(owner.__init__).parameters.items():
            if name not in own:
                continue
            compared.add(name)
            if f"{section}.{name}" in DIFFERENT:
                assert own[name] != parameter.default, name
                assert DIFFERENT[f"{section}.{name}"] in " ".join(str(type(part).__doc__).split()), name
            else:
                assert own[name] == parameter.default, (section, name)
    assert len(compared) > 3
    assert section == "loss" or compared == set(own)  # a section holds options of its loss alone
