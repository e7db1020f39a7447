"""nvcc on kernels.cu: the PTX of every kernel for one type."""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from support import ROOT

SOURCE = Path(__file__).with_name("kernels.cu")
ARCHITECTURE = "compute_90"
# Those of cuda_check.cmake, so that what is executed here is what the extension contains.
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", f"-arch={ARCHITECTURE}"]
FLAGS += [
    f"-D__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]
TYPES = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half", "float64": "double"}


def nvcc() -> str | None:
    """The compiler on PATH."""
    return shutil.which("nvcc")


def nvcc_version() -> str:
    """As in "13.0.88"."""
    told = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", told)[1]


@functools.cache
def ptx(dtype: str) -> str:
    """The text for "float32", "bfloat16", "float16" or "float64", compiled once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        command = [nvcc(), "-ptx", *FLAGS, f"-DKERNEL_TYPE={TYPES[dtype]}", "-I", ROOT / "csrc", SOURCE, "-o", out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
        return out.read_text()
