"""Builds margin_kernels._C from csrc/ and python/.

MARGIN_KERNELS_NO_EXT=1       build nothing: reference and Triton backends only
MARGIN_KERNELS_CUDA=auto|0|1  CUDA kernels; auto: where torch has CUDA and a CUDA toolkit is found
CUDA_HOME, CXX                the CUDA toolkit and the C++ compiler; both are checked before anything is compiled.
                              Without CUDA_HOME: /usr/local/cuda, or the toolkit of the nvcc on PATH, also a script
MARGIN_KERNELS_DEBUG=1        device code asserts that classes are in range, instead of giving NaN
TORCH_CUDA_ARCH_LIST          default 8.0;9.0+PTX
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent.resolve()


def sources(*patterns: str) -> list[str]:
    """The folders are globbed, as in CMakeLists.txt: no list of files can drift."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def check_compiler() -> None:
    """Compiles three lines of C++20, so that a compiler that is missing, broken or too old is one sentence."""
    # torch compiles with CXX or c++; setuptools links with CXX or the compiler that Python was built with.
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", sysconfig.get_config_var("CXX") or "c++"]
    program = "#include <concepts>\n#include <version>\nstatic_assert(std::integral<int>);\n"
    for compiler in compilers:
        command = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        try:
            result = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
        except OSError as error:
            found = error.strerror
        else:
            if result.returncode == 0:
                continue
            found = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[0]
        sys.exit(
            f"margin_kernels compiles C++20, and {shlex.quote(compiler)} cannot ({found}): install a C++ compiler (g++ "
            "11 or newer; CXX names another) or install without the compiled kernels: MARGIN_KERNELS_NO_EXT=1"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        sys.exit(
            f"margin_kernels compiles against the headers of Python, and {header} is missing: install them "
            "(python3-dev on Debian and Ubuntu), or install without the compiled kernels: MARGIN_KERNELS_NO_EXT=1"
        )


def missing(home: Path) -> str | None:
    """What a CUDA toolkit needs and this folder lacks."""
    headers = [home / "include" / "cuda_runtime.h", *home.glob("targets/*/include/cuda_runtime.h")]
    if not any(header.is_file() for header in headers):
        return "include/cuda_runtime.h"
    return None if (home / "bin" / "nvcc").is_file() else "bin/nvcc"


def check_toolkit(cuda_home: str) -> None:
    if lacks := missing(Path(cuda_home)):
        sys.exit(
            f"CUDA kernels cannot be built: CUDA_HOME={cuda_home} has no {lacks}. Set CUDA_HOME to the folder of a "
            "CUDA toolkit that has it, or build the CPU kernels alone: MARGIN_KERNELS_CUDA=0"
        )


def toolkit() -> str | None:
    """CUDA_HOME or CUDA_PATH as they are set; else a complete toolkit at the customary place, or of the nvcc on PATH;
    else, where there is an nvcc, the folder above it, of which check_toolkit says what it lacks."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return os.environ[name]
    nvcc = shutil.which("nvcc")
    places = [Path("/usr/local/cuda")]
    if nvcc is not None:
        places += [Path(nvcc).resolve().parents[1]]
        # A script that calls an nvcc elsewhere: that one says where it is.
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        places += [Path(place).parent for place in re.findall(r"^#\$ _HERE_=(.*)$", said.stderr, re.MULTILINE)]
    complete = [str(place) for place in places if missing(place) is None]
    return complete[0] if complete else (str(places[1]) if nvcc is not None else None)


def wants_cuda(torch_has_cuda: bool, cuda_home: str | None) -> bool:
    setting = os.environ.get("MARGIN_KERNELS_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        sys.exit(f"MARGIN_KERNELS_CUDA must be auto, 0 or 1, got {setting!r}")
    possible = torch_has_cuda and cuda_home is not None and bool(sources("csrc/cuda/*.cu"))
    if setting == "1" and not possible:
        sys.exit(
            "MARGIN_KERNELS_CUDA=1, but CUDA kernels cannot be built: "
            f"torch has CUDA: {torch_has_cuda}, CUDA_HOME: {cuda_home}, kernels: {len(sources('csrc/cuda/*.cu'))}"
        )
    return possible and setting != "0"


def extension() -> dict[str, Any]:
    home = toolkit()
    if home is not None:
        os.environ["CUDA_HOME"] = home  # torch would take the folder above any nvcc, also above a script
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "margin_kernels is built against the torch that is installed, and none was found here. Install torch, then "
            "run: pip install --no-build-isolation .   (MARGIN_KERNELS_NO_EXT=1 installs without the compiled kernels)"
        )
    check_compiler()
    cuda = wants_cuda(torch.version.cuda is not None, home)
    if cuda and home is not None:
        check_toolkit(home)
    version = torch.__version__.split("+")[0]
    (ROOT / "margin_kernels" / "_build.py").write_text(
        f'"""Written by setup.py: the torch that _C was built for."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
    )
    # -fno-math-errno lets sqrt become an instruction; nothing here relaxes the arithmetic itself.
    # -fopenmp: at::parallel_for is a template, and without the flag its pragma is ignored here: one thread.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = [
        *openmp,
        "-std=c++20",
        "-O3",
        "-fno-math-errno",
        "-g0",
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-fvisibility=hidden",
    ]
    macros = [("MARGIN_KERNELS_WITH_CUDA", "1" if cuda else "0"), ("MARGIN_KERNELS_TORCH_VERSION", f'"{version}"')]
    files = sources("csrc/*.cpp", "csrc/autograd/*.cpp", "csrc/cpu/*.cpp", "csrc/graph/*.cpp", "python/*.cpp")
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        # A target outside the classes then stops the kernel with its line instead of giving NaN.
        debug = ["-DMARGIN_KERNELS_DEVICE_ASSERT", "-UNDEBUG"] if os.environ.get("MARGIN_KERNELS_DEBUG") == "1" else []
        module = cpp_extension.CUDAExtension(
            "margin_kernels._C",
            files + sources("csrc/cuda/*.cu"),
            define_macros=macros,
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-lineinfo", *debug]},
            extra_link_args=openmp,
        )
    else:
        module = cpp_extension.CppExtension(
            "margin_kernels._C", files, define_macros=macros, extra_compile_args=flags, extra_link_args=openmp
        )
    module.depends = sources("csrc/**/*.h", "csrc/**/*.cuh")
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**({} if os.environ.get("MARGIN_KERNELS_NO_EXT") == "1" else extension()))
