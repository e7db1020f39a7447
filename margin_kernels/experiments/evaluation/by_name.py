"""Attacks by name, on a batch of images, within a radius: those of this package and of others that are installed.

    fgsm, ifgsm, pgd    attacks.py, l_inf, on the logit gap
    deepfool            the nearest boundary in l2, whatever the radius
    foolbox:NAME        an attack of foolbox with its own defaults, in its own norm: foolbox:LinfPGD, foolbox:L2PGD
    autoattack          AutoAttack, standard, l_inf, of the package autoattack or torchattacks

What another package returns is measured here: images that left the ball or the bounds are refused, and predictions are
those of the network. Its random numbers start from the same seed for every network.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from margin_kernels import deepfool
from margin_kernels.modes import eval_mode

from ..config import told
from ..data import Split
from . import attacks

OWN = ("fgsm", "ifgsm", "pgd", "deepfool")
NORMS = {math.inf: "linf", 2: "l2", 1: "l1"}
INSTALL = {"foolbox": "foolbox", "autoattack": "torchattacks"}  # what pip installs
SLACK = 1e-4  # of the radius: rounding in float32


@dataclass(frozen=True)
class NamedAttack:
    """An attack: its name, the norm of its radius, and call(model, x, y, eps, bounds) -> images."""

    name: str
    norm: str
    call: Callable[[nn.Module, Tensor, Tensor, float, tuple[float, float]], Tensor]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, eps: float, bounds: tuple[float, float]) -> Tensor:
        """Attacked images [N, *] of x [N, *] within `bounds` with labels y [N]; the model in eval mode, its gradients
        untouched. Raises ValueError where an image is not within `eps` and `bounds`."""
        own = self.name in OWN
        if not (own or math.isfinite(bounds[1])):
            raise ValueError(
                f"--attack {self.name} needs images with bounds: whitened ones (data.preprocess) have none"
            )
        with eval_mode(model), _frozen(model), torch.random.fork_rng(), told(f"--attack {self.name}"):
            torch.manual_seed(0)
            state = np.random.get_state()  # noqa: NPY002 (what other packages draw from)
            np.random.seed(0)  # noqa: NPY002
            try:
                found = self.call(model, x, y, eps, bounds).detach()
            finally:
                np.random.set_state(state)  # noqa: NPY002
        if self.name != "deepfool":
            self._check(found, x, eps, bounds)
        return found

    def _check(self, found: Tensor, x: Tensor, eps: float, bounds: tuple[float, float]) -> None:
        if found.shape != x.shape or not bool(found.isfinite().all()):
            raise ValueError(f"--attack {self.name} must return images {list(x.shape)}, got {list(found.shape)}")
        radius = float(lengths(found - x, self.norm).max()) if len(x) else 0.0
        low, high = (float(value) for value in found.aminmax()) if len(x) else bounds
        if radius > eps * (1 + SLACK) + 1e-6 or low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6:
            raise ValueError(
                f"--attack {self.name} must stay within {self.norm} {eps:g} and [{bounds[0]:g}, {bounds[1]:g}], "
                f"got {radius:g} and [{low:g}, {high:g}]"
            )


def lengths(difference: Tensor, norm: str) -> Tensor:
    """Norms [N] of [N, *]; norm "linf", "l2" or "l1"."""
    return difference.flatten(1).norm(float(norm[1:]), dim=1)


def find(name: str, steps: int = 10, max_iter: int = 50) -> NamedAttack:
    """The attack of a name; `steps` of ifgsm and pgd, `max_iter` of deepfool. Raises ValueError for a name that there
    is not, and for a package that is not installed."""
    if name in OWN:
        return NamedAttack(name, "l2" if name == "deepfool" else "linf", _own(name, steps, max_iter))
    if name == "autoattack":
        return NamedAttack(name, "linf", _autoattack())
    package, _, attack = name.partition(":")
    if package == "foolbox" and attack:
        return _foolbox(name, attack)
    raise ValueError(f"--attack must be one of {', '.join(OWN)}, autoattack or foolbox:NAME, got {name!r}")


def _own(name: str, steps: int, max_iter: int) -> Callable[..., Tensor]:
    def call(model: nn.Module, x: Tensor, y: Tensor, eps: float, bounds: tuple[float, float]) -> Tensor:
        if name == "deepfool":
            return x + deepfool(model, x, max_iter=max_iter).perturbation
        if name == "fgsm":
            return attacks.fgsm(model, x, y, eps, "gap", bounds).images
        iterated = attacks.pgd if name == "pgd" else attacks.ifgsm
        return iterated(model, x, y, eps, None, steps, "gap", bounds).images

    return call


def _foolbox(name: str, attack: str) -> NamedAttack:
    foolbox = _package("foolbox", name)
    made = getattr(foolbox.attacks, attack, None)
    if not isinstance(made, type) or not issubclass(made, foolbox.attacks.Attack):
        kinds = [key for key, value in vars(foolbox.attacks).items() if isinstance(value, type)]
        known = sorted(key for key in kinds if key.startswith(("Linf", "LInf", "L2", "L1")))
        raise ValueError(f"--attack {name}: foolbox has no attack {attack!r}; it has {', '.join(known)}, ...")
    with told(f"--attack {name}"):
        built = made()
    distance: Any = getattr(getattr(built, "distance", None), "p", None)
    norm = NORMS.get(distance)
    if norm is None:
        raise ValueError(f"--attack {name} must measure its radius in linf, l2 or l1")

    def call(model: nn.Module, x: Tensor, y: Tensor, eps: float, bounds: tuple[float, float]) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=bounds, device=x.device)
        _, images, _ = built(wrapped, x, y, epsilons=eps)
        return images

    return NamedAttack(name, norm, call)


def _autoattack() -> Callable[..., Tensor]:
    try:
        package: Any = importlib.import_module("autoattack")
        official = True
    except ImportError:
        package, official = _package("torchattacks", "autoattack"), False

    def call(model: nn.Module, x: Tensor, y: Tensor, eps: float, bounds: tuple[float, float]) -> Tensor:
        if bounds != (0.0, 1.0):
            raise ValueError(f"images must be in [0, 1], got [{bounds[0]:g}, {bounds[1]:g}]")
        options = {"norm": "Linf", "eps": eps, "version": "standard", "seed": 0, "verbose": False}
        if official:
            made = package.AutoAttack(model, device=x.device, **options)
            return made.run_standard_evaluation(x, y, bs=len(x))
        classes = model(x[:1]).shape[1]
        return package.AutoAttack(model, n_classes=classes, **options)(x, y)

    return call


def _package(module: str, attack: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = INSTALL[attack.partition(":")[0]]
        raise ValueError(f"--attack {attack} needs a package that is not installed: pip install {wanted}") from error


class _frozen:
    """Parameters that take no gradients, for a while."""

    def __init__(self, model: nn.Module) -> None:
        self.taken = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.taken:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for parameter in self.taken:
            parameter.requires_grad_(True)


def accuracies(
    model: nn.Module,
    split: Split,
    named: list[NamedAttack],
    eps: float,
    batch_size: int,
    device: torch.device | str = "cpu",
    tick: Callable[[float], None] = lambda share: None,
) -> dict[str, dict[str, Any]]:
    """By the name of the attack: radius, norm, number of images, and the share that is classified correctly once it is
    attacked."""
    result = {}
    for attack in named:
        right = 0
        for x, y in split.batches(batch_size, device):
            images = attack(model, x, y, eps, split.bounds)
            with eval_mode(model), torch.no_grad():
                right += int((model(images).argmax(1) == y).sum())
            tick(len(y) / len(split) / len(named))
        result[attack.name] = {"eps": eps, "norm": attack.norm, "samples": len(split), "accuracy": right / len(split)}
    return result
