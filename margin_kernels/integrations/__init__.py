"""Adapters for training libraries, each imported by its own name and by nothing else in the package:

from margin_kernels.integrations.timm import MarginTrainingTask
from margin_kernels.integrations.transformers import MarginTrainer
from margin_kernels.integrations.lightning import MarginModule, MonitorCallback
from margin_kernels.integrations.torchmetrics import MarginDistance
"""

from __future__ import annotations


def missing(package: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise where the package of an adapter is not installed or too old; `error` itself where another one
    is."""
    if error.name is None or error.name.split(".")[0] != package:
        return error
    if error.name != package:
        return ModuleNotFoundError(
            f"margin_kernels.integrations.{package} needs a {package} with {error.name}, which the installed one "
            f"lacks: pip install --upgrade {package}",
            name=error.name,
        )
    return ModuleNotFoundError(
        f"margin_kernels.integrations.{package} needs {package}, which is not installed: pip install {package}, or all "
        'packages of the adapters: pip install "margin_kernels[integrations]"',
        name=package,
    )
