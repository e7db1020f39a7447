"""An adapter whose library is not installed says what to install."""

import importlib
import sys

import pytest

from margin_kernels.integrations import missing

PACKAGES = ("timm", "transformers", "lightning", "torchmetrics")


class Absent:
    """Finds no module of a package, whether it is installed or not."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_error_names_the_package_and_the_extra(package, monkeypatch):
    name = f"margin_kernels.integrations.{package}"
    for module in [key for key in sys.modules if key == name or key.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Absent(package), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(name)
    words = str(raised.value)
    assert words.startswith(f"{name} needs {package}, which is not installed: pip install {package}, or")
    assert 'pip install "margin_kernels[integrations]"' in words


def test_a_package_that_is_too_old_is_to_be_upgraded():
    words = str(missing("timm", ModuleNotFoundError("No module named 'timm.task'", name="timm.task")))
    assert words.endswith("needs a timm with timm.task, which the installed one lacks: pip install --upgrade timm")


def test_the_error_of_another_package_stays_as_it_is():
    error = ModuleNotFoundError("No module named 'regex'", name="regex")
    assert missing("transformers", error) is error
