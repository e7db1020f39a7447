"""`python -m margin_kernels.info`: versions, what was built, which backend runs here and why the others do not."""

import os
import platform
import sys
from importlib import metadata

import torch

from . import backends
from .reference import __all__ as OPS
from .version import __version__


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def lines() -> list[str]:
    """The report, a line each."""
    result = [
        f"margin_kernels {__version__} in {os.path.dirname(__file__)}",
        f"python         {platform.python_version()} ({sys.executable})",
        f"torch          {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"triton         {_version_of('triton')}",
        f"processor      {platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
    ]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    result.append(f"CUDA devices   {', '.join(devices) or 'none'}")
    if backends.EXTENSION is None:
        result.append(f"_C             missing: {backends.EXTENSION_ERROR}")
    else:
        info = backends.EXTENSION.build_info()
        result.append(
            f"_C             for torch {info['torch']}, CUDA {'yes' if info['cuda'] else 'no'}, "
            f"compiler {info['compiler']}, CPU kernels use {info['cpu']}"
        )
    setting = os.environ.get("MARGIN_KERNELS_BACKEND")
    result.append(f"backend='auto' {'MARGIN_KERNELS_BACKEND=' + setting if setting else 'not overridden'}")
    for device in ["cpu", *(["cuda"] if devices else [])]:
        result.append("")
        result.append(f"on {device} tensors:")
        sample = (torch.zeros(1, 2, device=device),)
        for backend in backends.BACKENDS:
            reasons = {op: backends.why_not(backend, op, sample) for op in OPS}
            for reason in sorted(set(reasons.values()), key=str):
                ops = ", ".join(op for op in OPS if reasons[op] == reason)
                result.append(f"  {backend:10} {'runs ' + ops if reason is None else 'no:  ' + reason}")
    return result


if __name__ == "__main__":
    print("\n".join(lines()))
