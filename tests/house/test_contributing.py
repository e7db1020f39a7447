"""CONTRIBUTING.md to the letter: a clone of the repository gets a toy op and toy losses, file by file as it says.

Every file that a toy writes or changes must be named in its section. So the text and the code cannot drift apart.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout to clone"
)
NIGHTLY = pytest.mark.skipif(
    os.environ.get("MARGIN_KERNELS_NIGHTLY") != "1",
    reason="compiles the extension, which takes minutes: set MARGIN_KERNELS_NIGHTLY=1",
)


class Insertion(NamedTuple):
    """`text` goes into an existing file, in front of the first `before`, or at its end."""

    before: str | None
    text: str


# The toy op, half_square: y[n] = x[n]^2 / 2, dx[n] = grad[n] x[n]. A string is a new file.
DEFINITION: dict[str, str | list[Insertion]] = {
    "margin_kernels/reference/half_square.py": '''"""
half_square[n] = x[n]^2 / 2         x [N] -> [N]
"""

import torch
from torch import Tensor


def half_square(x: Tensor) -> Tensor:
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return wide * wide / 2
''',
    "margin_kernels/reference/__init__.py": [
        Insertion("from .margin_hinge import", "from .half_square import half_square\n"),
        Insertion('"margin_hinge", "one_to_n"', '"half_square", '),
    ],
    "margin_kernels/checks.py": [
        Insertion(
            None,
            """

def check_half_square(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() != 1:
        _value(f"x must have shape [N], got {list(x.shape)}")
""",
        )
    ],
    "margin_kernels/functional.py": [
        Insertion('    "margin_hinge",\n', '    "half_square",\n'),
        Insertion(
            None,
            '''

def half_square(x: Tensor, backend: str = "auto") -> Tensor:
    """Half the square, y[n] = x[n]^2 / 2, of x [N]; [N], float64 for float64 and else float32.

    Raises:
        ValueError, TypeError: another shape or dtype.
        BackendError: a backend named by the caller cannot run.
    """
    name, op = choose("half_square", (x,), backend)
    if name not in COMPILED:
        checks.check_half_square(x)
    return op(x)
''',
        ),
    ],
}

LIBRARY: dict[str, str | list[Insertion]] = {
    "csrc/ops.h": [
        Insertion(
            "}  // namespace margin_kernels\n",
            """// y = x^2 / 2
Tensor half_square(const Tensor& x);  // [N] -> [N]  acc

// dx = grad x
Tensor                                    // [N]  dtype of x
half_square_backward(const Tensor& grad,  // [N]
                     const Tensor& x);    // [N]

""",
        )
    ],
    "csrc/library.cpp": [
        Insertion(
            "}\n\nnamespace margin_kernels {\nnamespace {\n",
            """  m.def("half_square(Tensor x) -> Tensor");
  m.def("half_square_backward(Tensor grad, Tensor x) -> Tensor");
""",
        ),
        Insertion(
            "Tensor dual_norm(TensorList gradients",
            """Tensor half_square(const Tensor& x) {
  static auto op = find<decltype(half_square)>("margin_kernels::half_square");
  return op.call(x);
}

Tensor half_square_backward(const Tensor& grad, const Tensor& x) {
  static auto op = find<decltype(half_square_backward)>("margin_kernels::half_square_backward");
  return op.call(grad, x);
}

""",
        ),
    ],
    "csrc/meta.cpp": [
        Insertion(
            "}  // namespace\n\nTORCH_LIBRARY_IMPL",
            """Tensor half_square_meta(const Tensor& x) {
  check::half_square(x);
  return at::empty_symint(x.sym_sizes(), accumulate_options(x));
}

Tensor half_square_backward_meta(const Tensor&, const Tensor& x) {
  return at::empty_like(x, at::MemoryFormat::Contiguous);
}

""",
        ),
        Insertion(
            "}\n\n}  // namespace margin_kernels",
            """  m.impl("half_square", half_square_meta);
  m.impl("half_square_backward", half_square_backward_meta);
""",
        ),
    ],
    "csrc/check.h": [
        Insertion(
            "}  // namespace margin_kernels::check",
            """inline void half_square(const Tensor& x) {
  floating("x", x);
  TORCH_CHECK_VALUE(x.dim() == 1, "x must have shape [N], got ", x.sym_sizes());
}

""",
        )
    ],
    "csrc/math/half_square.h": """// y = x^2 / 2, dy / dx = x
#pragma once

#include "host_device.h"

namespace margin_kernels::math {

template <class T>
MK_HOST_DEVICE T half_square(T x) {
  return x * x / T(2);
}

template <class T>
MK_HOST_DEVICE T half_square_gradient(T grad, T x) {
  return grad * x;
}

}  // namespace margin_kernels::math
""",
    "csrc/cpu/half_square.cpp": """// Reads and writes N numbers.
#include "../math/half_square.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check.h"
#include "../ops.h"
#include "grain.h"

namespace margin_kernels {
namespace {

Tensor half_square_cpu(const Tensor& x) {
  check::half_square(x);
  const Tensor wide = x.to(check::accumulate_type(x.scalar_type())).contiguous();
  Tensor result = at::empty_like(wide);
  AT_DISPATCH_FLOATING_TYPES(wide.scalar_type(), "half_square", [&] {
    const auto* from = wide.const_data_ptr<scalar_t>();
    auto* to = result.data_ptr<scalar_t>();
    at::parallel_for(0, wide.size(0), grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) to[n] = math::half_square(from[n]);
    });
  });
  return result;
}

Tensor half_square_backward_cpu(const Tensor& grad, const Tensor& x) {
  const auto type = check::accumulate_type(x.scalar_type());
  const Tensor wide = x.to(type).contiguous(), arriving = grad.to(type).contiguous();
  Tensor result = at::empty_like(wide);
  AT_DISPATCH_FLOATING_TYPES(type, "half_square_backward", [&] {
    const auto *from = wide.const_data_ptr<scalar_t>(), *g = arriving.const_data_ptr<scalar_t>();
    auto* to = result.data_ptr<scalar_t>();
    at::parallel_for(0, wide.size(0), grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) to[n] = math::half_square_gradient(g[n], from[n]);
    });
  });
  return result.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, CPU, m) {
  m.impl("half_square", half_square_cpu);
  m.impl("half_square_backward", half_square_backward_cpu);
}

}  // namespace margin_kernels
""",
    "csrc/autograd/half_square.cpp": """// dx = grad x;  of <v, dx>: v x in grad, v grad in x
#include "function.h"

namespace margin_kernels {
namespace {

struct HalfSquareFunction : Function<HalfSquareFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    BelowAutograd guard;
    ctx->save_for_backward({x});
    return half_square(x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {half_square_backward(grads[0], ctx->get_saved_variables()[0])};
  }
};

// Plain ATen, so it can be differentiated again.
struct HalfSquareBackwardFunction : Function<HalfSquareBackwardFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& x) {
    BelowAutograd guard;
    ctx->save_for_backward({grad, x});
    return half_square_backward(grad, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& v) {
    const auto s = ctx->get_saved_variables();
    return {(v[0] * s[1]).to(s[0].scalar_type()), (v[0] * s[0]).to(s[1].scalar_type())};
  }
};

Tensor half_square_autograd(const Tensor& x) {
  if (!needs_graph({x})) {
    BelowAutograd guard;
    return half_square(x);
  }
  return HalfSquareFunction::apply(x);
}

Tensor half_square_backward_autograd(const Tensor& grad, const Tensor& x) {
  return HalfSquareBackwardFunction::apply(grad, x);
}

}  // namespace

TORCH_LIBRARY_IMPL(margin_kernels, Autograd, m) {
  m.impl("half_square", half_square_autograd);
  m.impl("half_square_backward", half_square_backward_autograd);
}

}  // namespace margin_kernels
""",
    "python/bindings.cpp": [
        Insertion('  m.def("margin_hinge",', '  m.def("half_square", &margin_kernels::half_square, py::arg("x"));\n'),
    ],
}

# Run in the clone. argv: the backend that "auto" is to take.
TRY_OP = """
import sys
import torch
import margin_kernels as mk
from margin_kernels import backends
from torch.autograd import grad, gradcheck, gradgradcheck

name = sys.argv[1]
x = torch.tensor([-3.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
assert backends.choose("half_square", (x,))[0] == name
y = mk.functional.half_square(x)
assert y.tolist() == [4.5, 0.0, 0.125]
(first,) = grad(y, x, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), create_graph=True)
assert first.tolist() == [-3.0, 0.0, 2.0]
(second,) = grad(first, x, torch.ones_like(x))
assert second.tolist() == [1.0, 2.0, 4.0]
half = torch.tensor([3.0, 255.0], dtype=torch.bfloat16, requires_grad=True)
wide = mk.functional.half_square(half)
assert wide.dtype == torch.float32 and wide.tolist() == [4.5, 32512.5]
assert grad(wide.sum(), half)[0].tolist() == [3.0, 255.0]
for backend in {name, "reference"}:
    f = lambda x: mk.functional.half_square(x, backend)
    assert f(x.detach()[::2]).tolist() == [4.5, 0.125] and f(x.detach()[:0]).tolist() == []
    assert gradcheck(f, (x,)) and gradgradcheck(f, (x,))
    for wrong, error, words in (
        (torch.ones(2, 3), ValueError, "x must have shape [N], got [2, 3]"),
        (torch.arange(3), TypeError, "x must be float64, float32, bfloat16 or float16, got int64"),
    ):
        try:
            f(wrong)
        except error as said:
            assert str(said).splitlines()[0] == words, said
        else:
            raise AssertionError(words)
if name == "cpu":
    torch.library.opcheck(torch.ops.margin_kernels.half_square.default, (x,))
    inputs = (torch.ones(3, dtype=torch.float64, requires_grad=True), x)
    torch.library.opcheck(torch.ops.margin_kernels.half_square_backward.default, inputs)
else:
    try:
        mk.functional.half_square(x, "cpu")
    except mk.BackendError as said:
        assert str(said).startswith("backend 'cpu' cannot run half_square: ")
    else:
        raise AssertionError("cpu")
"""

# Two toy losses: one of the logits, one of the distances at the taps.
LOSSES: dict[str, str | list[Insertion]] = {
    "margin_kernels/losses/quadratic.py": '''"""Quadratic loss of the gap: mean_n [margin + gap_n]_+^2."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..backends import BACKENDS
from .base import MarginLoss, one_of, positive
from .targets import NOTHING


class QuadraticMargins(NamedTuple):
    """loss [];  nll and gap [N], detached."""

    loss: Tensor
    nll: Tensor
    gap: Tensor


class QuadraticLoss(MarginLoss):
    """Mean over n of max(0, margin + max_{j != y_n} z[n,j] - z[n,y_n])^2 for logits z [N,C].

    Args:
        margin: in units of the logits, finite, > 0.
        backend: "auto" or a backend of margin_kernels.backends.
    """

    needs = "logits"
    checks: ClassVar = {"margin": positive, "backend": one_of("auto", *BACKENDS)}

    def __init__(self, margin: float = 1.0, backend: str = "auto") -> None:
        super().__init__()
        self.keep(locals())

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.statistics(logits, target).loss

    def statistics(self, logits: Tensor, target: Tensor) -> QuadraticMargins:
        found = functional.competitors(logits, target, 1, NOTHING, backend=self.backend)
        loss = F.relu(self.margin + found.gap[:, 0]).square().mean()
        return QuadraticMargins(loss, found.nll.detach(), found.gap[:, 0].detach())

    def logit_statistics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"gap": self.statistics(logits.detach(), target).gap}
''',
    "margin_kernels/losses/logistic_distance.py": '''"""Logistic loss of the distances: mean of softplus(-d[n,j,l])."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..backends import BACKENDS
from ..gradients.choose import choose
from ..gradients.request import Captured, Request
from .base import TapLoss, count, one_of, positive
from .targets import NOTHING


class DistanceMargins(NamedTuple):
    """loss [];  nll [N] and distance [N,k,L], detached."""

    loss: Tensor
    nll: Tensor
    distance: Tensor


class LogisticDistanceLoss(TapLoss):
    """Mean of softplus(-d[n,j,l]) with d = -gap[n,j] / (eps + || d gap[n,j] / d h_l[n] ||_2).

    Args:
        top_k: competitors, 1 <= top_k <= C - 1.
        eps: > 0.
        backend: "auto" or a backend of margin_kernels.backends.
    """

    checks: ClassVar = {"top_k": count, "eps": positive, "backend": one_of("auto", *BACKENDS)}

    def __init__(self, top_k: int = 1, eps: float = 1e-6, backend: str = "auto") -> None:
        super().__init__()
        self.keep(locals())

    def request(self, classes: int) -> Request:
        return Request(competitors=self.top_k, backend=self.backend)

    def statistics(
        self, logits: Tensor, target: Tensor, captured: Captured, passes: str = "loop", **how: Any
    ) -> DistanceMargins:
        gradients = choose(passes, self.request(logits.shape[1]), captured, logits, **how)
        found = functional.competitors(gradients.logits, target, self.top_k, NOTHING, backend=self.backend)
        distance = -found.gap.unsqueeze(-1) / (self.eps + gradients.norms(target, found.competitor))
        loss = gradients.attach(F.softplus(-distance).mean())
        return DistanceMargins(loss, found.nll.detach(), distance.detach())

    def logit_statistics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"nll": functional.competitors(logits.detach(), target, 1, NOTHING, backend=self.backend).nll}
''',
    "margin_kernels/losses/__init__.py": [
        Insertion("from .margins import", "from .logistic_distance import LogisticDistanceLoss\n"),
        Insertion("from .sensitivity import", "from .quadratic import QuadraticLoss\n"),
        Insertion('    "MarginSensitivityLoss",\n', '    "LogisticDistanceLoss",\n'),
        Insertion('    "SensitivityMargins",\n', '    "QuadraticLoss",\n'),
    ],
    "margin_kernels/__init__.py": [
        Insertion("from .memory import", "from .losses import LogisticDistanceLoss, QuadraticLoss\n"),
        Insertion('    "MarginSensitivityLoss",\n', '    "LogisticDistanceLoss",\n'),
        Insertion('    "__version__",\n', '    "QuadraticLoss",\n'),
    ],
}
EXPERIMENTS: dict[str, str | list[Insertion]] = {
    "margin_kernels/experiments/config/options.py": [
        Insertion(
            "@dataclass\nclass LossConfig:",
            '''@dataclass
class QuadraticConfig:
    """Options of QuadraticLoss.

    Args:
        margin: in units of the logits
    """

    margin: float = 1.0


@dataclass
class LogisticDistanceConfig:
    """Options of LogisticDistanceLoss.

    Args:
        top_k: competitors
    """

    top_k: int = 1


''',
        ),
        Insertion(
            '    """\n\n    kind: str = "cross_entropy"',
            """        quadratic: options of quadratic
        logistic_distance: options of logistic_distance
""",
        ),
        Insertion(
            "\n\n# The options of LossConfig that each loss reads",
            """    quadratic: QuadraticConfig = field(default_factory=QuadraticConfig)
    logistic_distance: LogisticDistanceConfig = field(default_factory=LogisticDistanceConfig)
""",
        ),
        Insertion(
            '    "vat": (',
            '    "quadratic": ("quadratic",),\n    "logistic_distance": ("logistic_distance", "layers", "passes"),\n',
        ),
    ],
    "margin_kernels/experiments/objectives/objective.py": [
        Insertion(
            "OBJECTIVES: dict[",
            """def _quadratic(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    return mk.MarginTask(model, mk.QuadraticLoss(**dataclasses.asdict(config.quadratic)))


def _logistic_distance(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    loss = mk.LogisticDistanceLoss(**dataclasses.asdict(config.logistic_distance))
    return mk.MarginTask(model, loss, layers=taps, passes=config.passes)


""",
        ),
        Insertion('    "vat": _vat', '    "quadratic": _quadratic,\n    "logistic_distance": _logistic_distance,\n'),
    ],
    "margin_kernels/experiments/config/shipped/digits_quadratic.yaml": """name: digits_quadratic
data: {name: digits}
loss: {kind: quadratic, quadratic: {margin: 2.0}}
training: {epochs: 2}
""",
    "margin_kernels/experiments/config/shipped/digits_logistic_distance.yaml": """name: digits_logistic_distance
data: {name: digits}
loss: {kind: logistic_distance, logistic_distance: {top_k: 2}, layers: [input, hidden]}
training: {epochs: 2}
""",
}

TRY_LOSSES = """
import torch
import margin_kernels as mk
from torch import nn
from torch.nn import functional as F
from margin_kernels import backends
from margin_kernels.experiments import config, data
from margin_kernels.experiments.training import Trainer

torch.manual_seed(0)
x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3


def gap(z):
    rival = z.masked_fill(F.one_hot(y, 3).bool(), -torch.inf).amax(1)
    return rival - z.gather(1, y[:, None])[:, 0]


for loss in (mk.QuadraticLoss(2.0), mk.LogisticDistanceLoss()):
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    task = mk.MarginTask(model, loss, **({"layers": ("input",)} if loss.needs == "taps" else {}))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    values = []
    for _ in range(3):
        inputs = x.clone().requires_grad_()
        g = gap(model(inputs))
        (slope,) = torch.autograd.grad(g.sum(), inputs, retain_graph=True)
        norm = slope.norm(dim=1)  # a constant
        expected = F.relu(2 + g).square() if loss.needs == "logits" else F.softplus(g / (1e-6 + norm))
        wanted = torch.autograd.grad(expected.mean(), list(model.parameters()))
        out = task(x, y)
        optimiser.zero_grad()
        out["loss"].backward()
        torch.testing.assert_close(out["loss"], expected.mean(), rtol=1e-12, atol=0)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
        optimiser.step()
        values.append(out["loss"].item())
    assert values[0] > values[1] > values[2], values
    with torch.no_grad():
        assert {"output"} < task(x, y).keys()
    found = task.explain(x, y)
    at_taps = ("loop", 4.0) if backends.EXTENSION is None else ("split", 3.0)
    assert (found.strategy, found.passes) == (("logits", 3.0) if loss.needs == "logits" else at_taps)
    assert repr(loss) in repr(task) and loss.options() == type(loss)(**vars(loss.options())).options()

for name, options in (("quadratic", {"margin": 2.0}), ("logistic_distance", {"top_k": 2})):
    settings = config.parse(["--config", f"digits_{name}"])
    assert config.own_options(settings)["loss"][name] == options
    assert name not in config.own_options(config.parse(["--loss.kind", "large_margin"]))["loss"]
    trainer = Trainer(settings, data.load("digits"))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    index = torch.arange(64)
    losses = [float(trainer.step(index)[0]) for _ in range(3)]
    assert losses[0] > losses[2], losses
    assert all(not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    for option, value in options.items():
        assert getattr(trainer.task.loss, option) == value
"""


def section(title: str) -> list[str]:
    """The numbered steps of a section of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    body = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return re.split(r"^\d+\. ", body, flags=re.MULTILINE)[1:]


def named(steps: list[str], stem: str) -> set[str]:
    """The files that the steps name, with the stem in place of X or NAME."""
    words = re.findall(r"`([^`\s]+)`", " ".join(steps))
    words = [re.sub(r"(?<![A-Za-z])(X|NAME)(?![A-Za-z])", stem, word) for word in words]
    return {word for word in words if "/" in word or word == "CHANGELOG.md"}


def write(folder: Path, files: dict[str, str | list[Insertion]]) -> None:
    for name, content in files.items():
        path = folder / name
        if isinstance(content, str):
            assert not path.exists(), f"{name} is there already"
            path.write_text(content)
            continue
        text = path.read_text()
        for before, inserted in content:
            place = len(text) if before is None else text.index(before)
            text = text[:place] + inserted + text[place:]
        path.write_text(text)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The commit that is checked out."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in the clone, which imports the clone's package."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MARGIN_KERNELS", "PYTEST", "COV_"))}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))  # ninja's folder
    kept |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=kept | environment, capture_output=True, text=True, check=False
    )


def succeed(folder: Path, *arguments: str, **environment: str) -> None:
    result = run(folder, *arguments, **environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def rooms(folder: Path) -> dict[str, bool]:
    """The clone's test_layout: each room of the toy op, and whether its test passes."""
    (layout,) = (folder / "tests").rglob("test_layout.py")
    result = run(folder, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=no", "-rfEp", str(layout))
    found = re.findall(r"^(PASSED|FAILED) \S*test_every_op_has_its_room\[half_square-(\S+)\]", result.stdout, re.M)
    assert found, result.stdout + result.stderr
    return {room.replace("{}", "half_square"): outcome == "PASSED" for outcome, room in found}


def test_no_section_has_more_than_six_steps() -> None:
    assert len(section("Add an op X")) <= 6 and len(section("Add a loss")) <= 6


def test_the_toy_op_is_written_by_the_files_of_the_first_two_steps() -> None:
    steps = section("Add an op X")
    assert {*DEFINITION} == named(steps[:1], "half_square")
    assert {*LIBRARY} == named(steps[1:2], "half_square") - {"csrc/cpu/half_square_kernel.h"}  # where a loop is hot


def test_the_toy_losses_are_written_by_the_files_of_their_steps() -> None:
    steps = section("Add a loss")
    for name in ("quadratic", "logistic_distance"):
        others = {"quadratic", "logistic_distance"} - {name}
        own = {file for file in {**LOSSES, **EXPERIMENTS} if not any(other in file for other in others)}
        read = {"margin_kernels/losses/base.py", "margin_kernels/gradients/request.py"}
        tests = {file for file in named(steps[3:4], name) if file.startswith("tests/")}
        assert own == named([*steps[:2], steps[3]], name) - read - tests


def test_the_layout_names_each_room_that_an_op_lacks(clone: Path) -> None:
    write(clone, DEFINITION)
    files = named(section("Add an op X"), "half_square")
    found = rooms(clone)
    assert found.keys() <= files  # CONTRIBUTING names every room
    assert {room for room, there in found.items() if there} == {"margin_kernels/reference/half_square.py"}
    write(clone, LIBRARY)
    found = rooms(clone)
    assert {room for room, there in found.items() if there} == {*DEFINITION, *LIBRARY} & found.keys()
    assert {"csrc/cuda/half_square.cu", "margin_kernels/triton/half_square.py"} <= found.keys()
    succeed(clone, "-c", TRY_OP, "reference")


@NIGHTLY
def test_a_toy_op_compiles_and_has_values_and_derivatives(clone: Path, tmp_path: Path) -> None:
    """All but a few sources include ops.h or check.h, so all are compiled, without optimisation."""
    write(clone, DEFINITION | LIBRARY)
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    succeed(clone, "setup.py", "build_ext", "--inplace", CXX=str(compiler), MARGIN_KERNELS_CUDA="0")
    succeed(clone, "-c", TRY_OP, "cpu")


def test_toy_losses_train_through_the_task_and_through_a_config(clone: Path) -> None:
    write(clone, LOSSES | EXPERIMENTS)
    for built in (ROOT / "margin_kernels").glob("_C.*.so"):  # where there is one, the split backward is tried too
        shutil.copy(built, clone / "margin_kernels")
    succeed(clone, "-c", TRY_LOSSES)
