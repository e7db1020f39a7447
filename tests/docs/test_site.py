"""The site: every public name and every page is on it, links lead somewhere, quoted messages are those of the code."""

import re

import hooks
import pytest
import yaml
from support import ROOT

import margin_kernels as mk
from margin_kernels import losses

PAGES = sorted((ROOT / "docs").rglob("*.md"))
SOURCES = [*(ROOT / "margin_kernels").rglob("*.py"), ROOT / "setup.py", ROOT / "build_backend.py"]
# Modules whose functions stand on a page by another heading, and what every module has.
ADAPTERS = {
    "timm": {"MarginTrainingTask"},
    "transformers": {"MarginTrainer"},
    "lightning": {"MarginModule", "MonitorCallback"},
    "torchmetrics": {"MarginDistance"},
}


def documented() -> set[str]:
    return {name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}


def public() -> set[str]:
    """Dotted names that a page documents; where a function has the name of its module, that of the function."""
    modules = {"functional", "gradients", "presets"}
    twice = {"bench", "deepfool"}
    moved = {"suggest_gamma", "choose"}  # likewise, in the rooms task and gradients
    names = {f"margin_kernels.{name}" for name in mk.__all__ if name not in modules | twice | moved | {"__version__"}}
    names |= {f"margin_kernels.{name}.{name}" for name in twice} | {"margin_kernels.presets"}
    names |= {"margin_kernels.task.suggest_gamma.suggest_gamma", "margin_kernels.gradients.choose.choose"}
    names |= {f"margin_kernels.functional.{name}" for name in mk.functional.__all__}
    names |= {f"margin_kernels.gradients.{name}" for name in mk.gradients.__all__ if name not in moved}
    names |= {f"margin_kernels.losses.{name}" for name in losses.__all__ if not hasattr(mk, name)}
    names |= {f"margin_kernels.integrations.{library}.{name}" for library, found in ADAPTERS.items() for name in found}
    return names | {"margin_kernels.distributed.fully_shard_task"}


def test_every_public_name_is_on_a_page_and_no_other_one():
    assert documented() == public()


def test_the_adapters_of_a_library_are_those_that_are_documented():
    for library, names in ADAPTERS.items():
        text = (ROOT / "margin_kernels" / "integrations" / f"{library}.py").read_text()
        assert set(re.findall(r"^class ([A-Z]\w+)", text, re.MULTILINE)) == names


def in_navigation(entries) -> list[str]:
    found = []
    for entry in entries:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            found += in_navigation(value) if isinstance(value, list) else [value]
    return found


def test_every_page_and_every_example_is_in_the_navigation():
    shown = in_navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(shown) == len(set(shown))
    expected = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    expected |= {f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.py")}
    results = {"results/README.md", "results/papers/README.md", "results/presets/README.md"}
    assert set(shown) == expected | results | {"changelog.md", "contributing.md"}


def test_the_readme_is_short_and_leads_to_the_pages():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (ROOT / target).exists(), target


KNOWN = {
    "papers.md",
    "losses/one-to-n.md",
    "examples/margin_monitor.md",
    "results/README.md",
    "results/papers/README.md",
}


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[a](papers.md#letters)", "[a](papers.md#letters)"),
        ("losses/one-to-n.md", "[a](../papers.md)", "[a](../papers.md)"),
        ("losses/one-to-n.md", "[a](../../benchmarks/results/README.md#x)", "[a](../results/README.md#x)"),
        ("examples.md", "[`a`](../examples/margin_monitor.py)", "[`a`](examples/margin_monitor.md)"),
        ("results/papers/README.md", "[a](../README.md)", "[a](../README.md)"),
        ("results/README.md", "[a](papers/README.md)", "[a](papers/README.md)"),
        ("index.md", "[a](../tests/conftest.py)", "`a`"),
        ("index.md", "[`a`](../tests/conftest.py)", "`a`"),
        ("index.md", "[a](https://example.org/b.md)", "[a](https://example.org/b.md)"),
        ("index.md", "```\n[a](../tests/conftest.py)\n```\n", "```\n[a](../tests/conftest.py)\n```\n"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page, text, expected):
    assert hooks.rewritten(text, page, KNOWN) == expected


@pytest.mark.parametrize("text", ["[a](nowhere.md)", "![a](../tests/conftest.py)"])
def test_a_link_to_nothing_and_a_picture_that_the_site_lacks_are_errors(text):
    with pytest.raises(ValueError, match="there is no"):
        hooks.rewritten(text, "index.md", KNOWN)


def test_an_example_becomes_a_page_with_its_words_and_its_code():
    page = hooks.example(ROOT / "examples" / "margin_monitor.py")
    assert page.startswith("# margin_monitor.py\n\nThe margins of every layer") and "```python\nimport torch" in page


def quoted() -> list[str]:
    """The messages in the first column of the tables of troubleshooting.md, as far as they are text of the code."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| `([^`|]+)` \|", text, re.MULTILINE)
    return [cell for cell in cells if not cell.startswith("out[")]


@pytest.mark.parametrize("message", quoted())
def test_a_message_that_the_page_quotes_is_one_of_the_code(message):
    """What a case fills in is left out: 'x', 'act', A, B, a number, a file, a compiler, dots."""
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|'\w+'|\b[AB]\b|\b\d+\b|c\+\+ cannot|include/\S+", message)]
    sources = [re.sub(r'"\s*\n\s*f?"', "", source.read_text()) for source in SOURCES]
    for piece in (piece for piece in pieces if len(piece) > 6):
        assert any(piece in source or piece.replace('"', '\\"') in source for source in sources), piece
