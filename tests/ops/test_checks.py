"""margin_kernels/checks.py and csrc/check.h know the same mistakes in the same words.

Messages are read off both files as templates, `{}` where a value stands. That each wrong call raises the same sentence
on every backend is test_errors.py's business; this test finds a message that only one of the files has.
"""

import ast
import re
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
# Arguments of the Python functions that reach the ops as tensors of hyper-parameters.
PYTHON_ONLY = {"{} must be >= 0, got {}", "layer_weights must not all be 0 with layer_reduction=mean, got {}"}
# An op that only the CPU's library has.
CPP_ONLY = "convolution_input_gradient"


def without_function(source: str, name: str) -> str:
    """C++ source without one inline function, which ends at a brace in the first column."""
    start = source.index(f"inline void {name}(")
    return source[:start] + source[source.index("\n}", start) :]


def cpp_messages(source: str) -> set[str]:
    """The messages of TORCH_CHECK and its kind: literals are joined, any other argument is a value."""
    messages = set()
    for call in re.finditer(r"TORCH_CHECK(?:_TYPE|_VALUE)?\(", source):
        depth, place, arguments = 1, call.end(), [""]
        while depth:
            literal = re.compile(r'"(?:[^"\\]|\\.)*"').match(source, place)
            piece = literal[0] if literal else source[place]
            place += len(piece)
            depth += (piece in "([{") - (piece in ")]}")
            if piece == "," and depth == 1:
                arguments.append("")
            elif depth:
                arguments[-1] += piece
        literals = [re.findall(r'"((?:[^"\\]|\\.)*)"', argument) for argument in arguments[1:]]
        messages.add("".join("".join(found) if found else "{}" for found in literals))
    return messages


def python_messages(source: str) -> set[str]:
    """The messages of the calls of _value and _type."""
    messages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("_value", "_type"):
            message = node.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            messages.add("".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts))
    return messages


def agree(one: str, other: str) -> bool:
    """Whether a value of one template may stand for what the other spells out."""

    def fits(template: str, text: str) -> bool:
        return re.fullmatch(".+".join(map(re.escape, template.split("{}"))), text) is not None

    return fits(one, other) or fits(other, one)


def without_partner(messages: set[str], others: set[str]) -> list[str]:
    return sorted(message for message in messages if not any(agree(message, other) for other in others))


CPP = cpp_messages(without_function((ROOT / "csrc/check.h").read_text(), CPP_ONLY))
PYTHON = python_messages((ROOT / "margin_kernels/checks.py").read_text())


def test_messages_are_read_off_both_files():
    assert "eps must be finite and >= 0, got {}" in CPP & PYTHON
    assert len(CPP) > 30
    assert len(PYTHON) > 30


def test_every_message_of_the_library_is_one_of_python():
    assert without_partner(CPP, PYTHON) == []


def test_every_message_of_python_is_one_of_the_library():
    assert without_partner(PYTHON - PYTHON_ONLY, CPP) == []
    assert PYTHON >= PYTHON_ONLY


def test_a_message_of_one_file_alone_is_found():
    assert without_partner({"p must be above 1, got {}"}, PYTHON) == ["p must be above 1, got {}"]
