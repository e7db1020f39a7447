"""What `dir` and `import *` show: the public names, all of which exist and are documented, and nothing besides."""

import inspect

import pytest

import margin_kernels as mk
from margin_kernels import reference


@pytest.mark.parametrize("module", [mk, mk.functional], ids=["margin_kernels", "functional"])
def test_only_public_names_are_shown(module):
    assert dir(module) == sorted(module.__all__)
    shown: dict[str, object] = {}
    exec(f"from {module.__name__} import *", shown)
    assert set(shown) - {"__builtins__"} == set(module.__all__)
    for name in set(dir(module)) - {"__version__"}:
        assert inspect.getdoc(getattr(module, name)), name


def test_every_op_is_public_and_what_is_public_besides_is_what_an_op_returns():
    assert set(mk.functional.__all__) - set(reference.__all__) == {"Competitors", "DeepFoolStep"}
    assert set(reference.__all__) <= set(mk.functional.__all__)


def test_what_is_imported_on_the_way_can_be_reached_and_is_not_shown():
    assert "losses" not in dir(mk) and inspect.ismodule(mk.losses)
    assert "Tensor" not in dir(mk.functional) and callable(mk.functional.hinge_of)
