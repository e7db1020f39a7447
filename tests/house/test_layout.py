"""Each op has its room in every layer, under the same stem, and no layer has a room of no op."""

import ast
import graphlib

import pytest
from support import ROOT

from margin_kernels import reference
from margin_kernels import triton as triton_backend

OPS = sorted(reference.__all__)
# An op of the CPU alone, without a public function: what it stands in for is PyTorch's own.
CPU_ONLY = ["convolution_input_gradient"]
CPU_ROOMS = ["csrc/autograd/{}.cpp", "csrc/cpu/{}.cpp", "tests/cpp/test_{}.cpp", "tests/ops/test_{}.py"]

ROOMS = [
    "csrc/math/{}.h",
    "csrc/autograd/{}.cpp",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "csrc/cuda/{}.cuh",
    "tests/cpp/test_cuda_{}.cpp",
    "margin_kernels/reference/{}.py",
    "margin_kernels/triton/{}.py",
    "tests/ops/test_{}.py",
    "benchmarks/bench_{}.py",
]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_room(op, room):
    assert (ROOT / room.format(op)).is_file()


@pytest.mark.parametrize("room", CPU_ROOMS)
@pytest.mark.parametrize("op", CPU_ONLY)
def test_an_op_of_the_cpu_has_the_rooms_that_it_needs(op, room):
    assert (ROOT / room.format(op)).is_file()
    for file in ("library.cpp", "meta.cpp", "ops.h", "check.h"):
        assert f"{op}(" in (ROOT / "csrc" / file).read_text() or f'"{op}"' in (ROOT / "csrc" / file).read_text()


@pytest.mark.parametrize("folder,suffix", [("csrc/autograd", ".cpp"), ("csrc/cpu", ".cpp"), ("csrc/cuda", ".cu")])
def test_no_source_stands_for_something_that_is_not_an_op(folder, suffix):
    assert {path.stem for path in (ROOT / folder).glob(f"*{suffix}")} <= {*OPS, *CPU_ONLY}


@pytest.mark.parametrize("launcher", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_every_launcher_has_kernels_without_torch_and_a_test_of_them(launcher):
    kernels = launcher.with_suffix(".cuh").read_text()
    for header in ("ATen", "torch", "c10"):
        assert f"#include <{header}" not in kernels
    assert "asm" not in kernels and "atomicAdd" not in kernels
    text = launcher.read_text()
    for name in (launcher.stem, f"{launcher.stem}_backward"):
        assert f'm.impl("{name}",' in text
    assert f'"cuda/{launcher.stem}.cuh"' in (ROOT / f"tests/cpp/test_cuda_{launcher.stem}.cpp").read_text()


def test_every_test_file_stands_in_a_room_under_a_name_of_its_own():
    files = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    assert {path.parts[0] for path in files if len(path.parts) == 2} >= {
        "ops",
        "losses",
        "gradients",
        "task",
        "experiments",
    }
    assert not [path for path in files if len(path.parts) != 2]
    assert len({path.name for path in files}) == len(files)  # mypy takes equal names for one module


def test_every_op_has_a_schema_and_a_shape_function():
    library, meta, declared = ((ROOT / "csrc" / f).read_text() for f in ("library.cpp", "meta.cpp", "ops.h"))
    for op in OPS:
        for name in (op, f"{op}_backward"):
            assert f'm.def("{name}(' in library.replace("\n      ", "") and f'm.impl("{name}",' in meta
            assert f"{name}(" in declared


def test_every_op_has_triton_kernels():
    assert sorted(triton_backend.OPS) == OPS


def test_both_build_files_glob_the_same_folders():
    setup, cmake = (ROOT / "setup.py").read_text(), (ROOT / "CMakeLists.txt").read_text()
    for pattern in ("csrc/*.cpp", "csrc/autograd/*.cpp", "csrc/cpu/*.cpp", "csrc/graph/*.cpp", "csrc/cuda/*.cu"):
        assert pattern in setup and pattern in cmake
    assert "python/*.cpp" in setup and "python/*.cpp" not in cmake  # the library knows no Python


def test_only_the_bindings_know_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "Python.h" not in text and "pybind" not in text and "torch/extension.h" not in text, path


PACKAGE = ROOT / "margin_kernels"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From above to below: a file imports from its own room and from those to the right of it.
ORDER = ("experiments", "integrations", "bench", "task", "losses", "deepfool", "gradients")
ORDER += ("functional", "backends", "triton", "reference")

EXPERIMENTS = ("__main__", "cli", "demo", "report", "sweeps", "training", "objectives")
EXPERIMENTS += ("evaluation", "models", "results", "data", "config")


def imported(name: str) -> set[str]:
    """The files of the package that a file imports, at its top or inside a function."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            found |= {full if (full := f"{base}.{alias.name}") in FILES else base for alias in node.names}
    return (found & FILES.keys()) - {name}


IMPORTS = {name: imported(name) for name in FILES}


def room(name: str, depth: int = 1) -> str:
    return ".".join(name.split(".")[1 : 1 + depth])


def test_the_imports_are_read_as_they_stand():
    assert IMPORTS["margin_kernels.functional"] >= {"margin_kernels.backends", "margin_kernels.checks"}
    assert "margin_kernels.triton.ops" in IMPORTS["margin_kernels.triton"]  # inside a function
    assert "margin_kernels.experiments.evaluation.attacks" in IMPORTS["margin_kernels.experiments.evaluation"]
    assert "margin_kernels" in IMPORTS["margin_kernels.experiments.training.trainer"]


def test_no_file_imports_itself_by_way_of_others():
    assert len(list(graphlib.TopologicalSorter(IMPORTS).static_order())) == len(FILES)


def test_the_rooms_of_the_experiments_import_from_those_below():
    folders = {path.parent.name for path in (PACKAGE / "experiments").glob("*/__init__.py")}
    assert sorted(folders) == sorted(EXPERIMENTS[1:])
    wrong = []
    for name, found in IMPORTS.items():
        for other in (other for other in found if room(name) == room(other) == "experiments"):
            own, its = (room(each, 2).removeprefix("experiments.") for each in (name, other))
            if EXPERIMENTS.index(own) > EXPERIMENTS.index(its):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_dependencies_point_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, found in IMPORTS.items()
        for other in found
        if room(name) in ORDER and room(other) in ORDER and ORDER.index(room(name)) > ORDER.index(room(other))
    ]
    assert not wrong
    above = {name for name, found in IMPORTS.items() if "margin_kernels" in found}
    assert {room(name) for name in above} == {"experiments"}  # what users import is for users


def test_nothing_imports_the_adapters_of_other_libraries():
    for name, found in IMPORTS.items():
        assert room(name) == "integrations" or not any(room(other) == "integrations" for other in found), name
    for path in (PACKAGE / "integrations").glob("*.py"):  # each is of one library, and takes nothing of the others
        others = {f"margin_kernels.integrations.{p.stem}" for p in (PACKAGE / "integrations").glob("[a-z]*.py")}
        own = "margin_kernels.integrations" + ("" if path.stem == "__init__" else f".{path.stem}")
        assert not IMPORTS[own] & others, path


def test_nothing_below_the_experiments_imports_them():
    for name, found in IMPORTS.items():
        assert room(name) == "experiments" or not any(room(other) == "experiments" for other in found), name
