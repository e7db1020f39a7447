"""What setup.py and build_backend.py say where something is missing: one sentence, before anything is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

# Stands for a CUDA build of torch, and says what setup.py would compile instead of compiling it.
CUDA_TORCH = {
    "torch/__init__.py": '__version__ = "2.14.1+cu130"\nfrom . import version',
    "torch/version.py": 'cuda = "13.0"',
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": """
import os, sys
CUDA_HOME = os.environ["CUDA_HOME"]
def CUDAExtension(name, files, **options):
    sys.exit(f"CUDA: {sum(file.endswith('.cu') for file in files)} kernel files, {CUDA_HOME}")
def CppExtension(name, files, **options):
    sys.exit(f"CPU: {sum(file.endswith('.cu') for file in files)} kernel files")
""",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def build(*command: str, modules: Path | None = None, **environment: str) -> list[str]:
    """The lines of output of a build that fails: setup.py, or the command given. `modules` hides installed ones."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MARGIN_KERNELS", "PYTHON"))}
    variables |= environment | ({} if modules is None else {"PYTHONPATH": str(modules)})
    arguments = command or ("setup.py", "--version")
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return (result.stdout + result.stderr).strip().splitlines()


@pytest.fixture
def built_before():
    """A build that fails leaves the note of the one before as it is."""
    note = ROOT / "margin_kernels" / "_build.py"
    before = note.read_text() if note.is_file() else None
    yield
    assert (note.read_text() if note.is_file() else None) == before


NO_COMPILER = (
    "margin_kernels compiles C++20, and {} cannot ({}): install a C++ compiler (g++ 11 or newer; CXX names another) "
    "or install without the compiled kernels: MARGIN_KERNELS_NO_EXT=1"
)


@pytest.mark.usefixtures("built_before")
def test_pip_says_in_one_line_that_there_is_no_compiler(tmp_path):
    pip = ("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), ".")
    lines = build(*pip, CXX="/nonexistent/c++")
    assert not any("Traceback" in line for line in lines)
    start = next(i for i, line in enumerate(lines) if "lines of output]" in line)
    assert lines[start].endswith("[1 lines of output]")
    assert lines[start + 1].strip() == NO_COMPILER.format("/nonexistent/c++", "No such file or directory")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, words",
    [("exit 1", "exit status 1"), ("echo \"unknown option '-std=c++20'\" >&2; exit 1", "unknown option '-std=c++20'")],
)
def test_a_compiler_that_fails_or_is_too_old_is_named_with_its_own_words(tmp_path, script, words):
    compiler = write(tmp_path, {"g++": f"#!/bin/sh\ncat >/dev/null\n{script}\n"}) / "g++"
    compiler.chmod(0o755)
    (line,) = build(modules=write(tmp_path / "site", CUDA_TORCH), CXX=str(compiler), CUDA_HOME="")
    assert line == NO_COMPILER.format(compiler, words)


def test_a_missing_torch_is_named(tmp_path):
    modules = write(tmp_path, {"torch.py": "raise ImportError"})
    (line,) = build(modules=modules)
    assert line.startswith("margin_kernels is built against the torch that is installed, and none was found here.")


@pytest.mark.parametrize(
    "files, found",
    [
        ({"setuptools.py": "raise ImportError"}, "is not installed here"),
        ({"setuptools/__init__.py": '__version__ = "65.5.0"', "setuptools/build_meta.py": ""}, "is 65.5.0 here"),
    ],
)
def test_a_missing_or_old_setuptools_is_named(tmp_path, files, found):
    (line,) = build("-c", "import build_backend", modules=write(tmp_path, files))
    assert line == (
        f"margin_kernels is built with setuptools 77 or newer, which {found}: pip install 'setuptools>=77' and run "
        "the same command again"
    )


def test_the_oldest_setuptools_is_the_same_everywhere():
    oldest = '"setuptools>=77"'
    for file in ("pyproject.toml", "Makefile", ".ci/torch_2_14"):
        assert oldest in (ROOT / file).read_text()
    assert "OLDEST = 77" in (ROOT / "build_backend.py").read_text()


@pytest.mark.usefixtures("built_before")
@pytest.mark.parametrize(
    "present, missing",
    [
        ([], "include/cuda_runtime.h"),
        (["include/cuda_runtime.h"], "bin/nvcc"),
        (["bin/nvcc"], "include/cuda_runtime.h"),
    ],
)
@pytest.mark.parametrize("setting", ["auto", "1"])
def test_an_incomplete_toolkit_is_named_with_two_remedies(tmp_path, present, missing, setting):
    home = write(tmp_path / "cuda", dict.fromkeys(present, ""))
    modules = write(tmp_path / "site", CUDA_TORCH)
    (line,) = build(modules=modules, CUDA_HOME=str(home), MARGIN_KERNELS_CUDA=setting)
    assert line == (
        f"CUDA kernels cannot be built: CUDA_HOME={home} has no {missing}. Set CUDA_HOME to the folder of a CUDA "
        "toolkit that has it, or build the CPU kernels alone: MARGIN_KERNELS_CUDA=0"
    )


@pytest.mark.usefixtures("built_before")
def test_the_toolkit_of_an_nvcc_that_is_a_script_is_found(tmp_path):
    home = write(tmp_path / "toolkit", {"include/cuda_runtime.h": "", "bin/nvcc": ""})
    script = write(tmp_path / "path", {"bin/nvcc": f"#!/bin/sh\necho '#$ _HERE_={home}/bin' >&2\n"}) / "bin" / "nvcc"
    script.chmod(0o755)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['setup.py', '--version']; import setup; "
    # The customary place may hold a toolkit here: another one stands for it.
    code = "import setuptools; setuptools.setup = lambda **_: None; " + code
    code += (
        "setup.missing = lambda folder, own=setup.missing: 'all' if str(folder) == '/usr/local/cuda' else own(folder); "
    )
    code += "sys.exit(f'{setup.toolkit()}')"
    variables = {
        "MARGIN_KERNELS_NO_EXT": "1",
        "CUDA_HOME": "",
        "CUDA_PATH": "",
        "PATH": f"{script.parent}:/usr/bin:/bin",
    }

    def found(**more):
        (line,) = [line for line in build("-c", code, **variables | more) if line]
        return line

    assert found() == str(home)
    assert found(CUDA_HOME="/given") == "/given" and found(CUDA_PATH="/given") == "/given"
    (home / "bin" / "nvcc").unlink()
    assert found() == str(tmp_path / "path")  # of which check_toolkit says what it lacks
    assert found(PATH="/usr/bin:/bin") == "None"


@pytest.mark.parametrize("header", ["include/cuda_runtime.h", "targets/x86_64-linux/include/cuda_runtime.h"])
def test_a_complete_toolkit_is_taken_and_can_be_declined(tmp_path, header):
    home = write(tmp_path / "cuda", {header: "", "bin/nvcc": ""})
    # A complete toolkit lets setup.py go on to write _build.py: in a copy.
    copy = write(tmp_path / "copy", {"setup.py": (ROOT / "setup.py").read_text(), "margin_kernels/__init__.py": ""})
    write(copy, {f"csrc/cuda/{i}.cu": "" for i in range(3)})
    run = (str(copy / "setup.py"), "--version")
    modules = write(tmp_path / "site", CUDA_TORCH)
    assert build(*run, modules=modules, CUDA_HOME=str(home)) == [f"CUDA: 3 kernel files, {home}"]
    assert build(*run, modules=modules, CUDA_HOME=str(home), MARGIN_KERNELS_CUDA="0") == ["CPU: 0 kernel files"]
