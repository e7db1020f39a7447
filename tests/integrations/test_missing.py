"""An adapter whose library is not installed says what to install."""

import importlib
import sys

import pytest

PACKAGES = ("timm", "transformers", "lightning", "torchmetrics")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_error_names_the_package_and_the_extra(package, monkeypatch):
    name = f"margin_kernels.integrations.{package}"
    for module in [key for key in sys.modules if key == name or key.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # its import raises ModuleNotFoundError
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(name)
    words = str(raised.value)
    assert words.startswith(f"{name} needs {package}, which is not installed: pip install {package}, or")
    assert 'pip install "margin_kernels[integrations]"' in words


def test_the_error_of_another_package_stays_as_it_is():
    from margin_kernels.integrations import missing

    error = ModuleNotFoundError("No module named 'regex'", name="regex")
    assert missing("transformers", error) is error
