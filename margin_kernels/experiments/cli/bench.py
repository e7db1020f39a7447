"""`margin-kernels bench`: what a step of each loss costs, on the user's own model or a shipped one.

margin-kernels bench --model digits_cnn mnist_cnn
margin-kernels bench --model my_package.nets:make --args '{"width": 64}' --shape 3x32x32 --layers input "layer*"
margin-kernels bench --model nets.py:make --data nets.py:make_batch --batch-size 16
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from margin_kernels import bench as measure
from margin_kernels.task.reading import Inputs, Reading

from .. import models
from ..config import bounds, called_by, is_code
from ..training import resolve_device
from .parser import Parser

CLASSES = 10  # of shipped networks, unless --classes says so
BATCH = 32  # inputs
SIDE = 65536  # the largest side of an input


def bench(arguments: list[str]) -> int:
    parser = Parser(
        prog="margin-kernels bench",
        description="What a training step of each loss costs on a model: time and memory to cross-entropy, the time of "
        "the passes that it needs, the strategy that obtains its gradients, and why.",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        help=f'"package.module:make" or "file.py:make", a function or class that gives the model, or one of '
        f"{', '.join(models.MODELS)}",
    )
    parser.add_argument("--args", default=None, help="keywords of the model as JSON, as in '{\"width\": 64}'")
    parser.add_argument("--shape", help="of one random input, as in 3x32x32 (default: a shipped model's own)")
    parser.number("--classes", bounds.MANY, 0, f"of the targets (default: {CLASSES}, of your models all)")
    parser.number("--batch-size", bounds.BATCH, BATCH, f"inputs of a batch; --data gets it too (default: {BATCH})")
    parser.add_argument(
        "--data",
        default=None,
        help='"package.module:make_batch" or "file.py:make_batch": gives x, y; a dict x is keywords',
    )
    parser.add_argument("--layers", nargs="+", help="taps (default: input; of a shipped model its hidden layers too)")
    parser.number("--rounds", bounds.TIMES, 15, "of measurements (default: 15)")
    threads = torch.get_num_threads()
    parser.number("--threads", bounds.PROCESSES, threads, f"of the CPU (default: {threads}, as torch takes)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--eval", action="store_true", help="the model in evaluation mode")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    torch.set_num_threads(options.threads)
    given = _keywords(options.args)
    if options.data is not None and options.shape is not None:
        raise ValueError("--shape is of a random batch: leave it out where --data gives one")
    for name in options.model:
        model, shape = _model(name, given, options)
        model = model.to(device).train(not options.eval)
        x, y = _batch(name, model, shape, options)
        layers = options.layers
        if layers is None and name in models.MODELS:
            layers = ["input", *models.hidden_taps(name)]
        print(f"{name}: {measure(model, x, y, layers=layers, rounds=options.rounds)}\n")
    return 0


def _keywords(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"--args must be JSON, got {text!r} ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"--args must be a JSON object with the keywords of the model, got {text!r}")
    return found


def _model(name: str, given: dict[str, Any], options: Any) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The model, and the shape of one random input, None where --data has to give it."""
    shape = None if options.shape is None else _shape(options.shape)
    torch.manual_seed(0)
    if not is_code(name):
        if name not in models.MODELS:
            raise ValueError(
                '--model must be "package.module:make", "file.py:make" or one of '
                f"{', '.join(models.MODELS)}, got {name!r}"
            )
        default = models.default_shape(name)
        if shape is not None and len(shape) != len(default):
            raise ValueError(f"--shape must be of an image, as in 3x32x32, for {name}, got {options.shape!r}")
        image = default if shape is None else (shape[0], shape[1], shape[2])
        try:
            return models.build(name, image, options.classes or CLASSES, **given), image
        except TypeError as error:
            raise ValueError(f"--args must fit {name}, got {list(given)} ({error})") from error
    model = called_by("--model", "--args", name, given, {})
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} must give an nn.Module, got {type(model).__name__}")
    if shape is None and options.data is None:
        raise ValueError(f"--shape must say what {name} takes, as in --shape 3x32x32, or --data give a batch")
    return model, shape


def _batch(name: str, model: nn.Module, shape: tuple[int, ...] | None, options: Any) -> tuple[Any, Tensor]:
    """A batch on the model's device, of --data or random."""
    y = None
    if options.data is None:
        assert shape is not None
        x: Any = torch.rand(options.batch_size, *shape)
    else:
        found = called_by("--data", "--batch-size", options.data, {"batch_size": options.batch_size}, {})
        if not isinstance(found, (tuple, list)) or len(found) != 2 or not isinstance(found[1], Tensor):
            raise ValueError(f"--data {options.data} must give x and y, y a tensor, got {type(found).__name__}")
        x, y = found
    device = resolve_device(options.device)
    x = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)
    inputs = Inputs((), x) if isinstance(x, dict) else Inputs((x,), {})
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            logits = Reading()(copy.deepcopy(model), inputs)
    except Exception as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs.tensors())
        raise ValueError(f"--model {name} raised {type(error).__name__} on {shapes}: {error}") from error
    if y is None:
        classes = options.classes or logits.shape[1]
        y = torch.randint(classes, (options.batch_size,))
    return x, y.to(device)


def _shape(text: str) -> tuple[int, ...]:
    """3x32x32 as numbers. Raises ValueError."""
    sides = text.split("x")
    if not all(side.isdecimal() and len(side) < 6 and 1 <= int(side) <= SIDE for side in sides):
        raise ValueError(f"--shape must be sides in [1, {SIDE}] with x between them, as in 3x32x32, got {text!r}")
    return tuple(map(int, sides))
