"""What the site shows besides docs/: the pages and figures of benchmarks/results/, a page for each of examples/, the
changelog and CONTRIBUTING.md.

Links of a page are paths in the repository, so that they hold where the repository is browsed. Here they become links
between pages of the site; what has no page there becomes plain text.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
SHOWN = (".md", ".png", ".svg", ".csv", ".json", ".txt")
# Files outside docs/ -> their pages.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def in_repository(page: str) -> str:
    """The path of a page's source, from the root of the repository."""
    if page.startswith("results/"):
        return f"{RESULTS}/{page.removeprefix('results/')}"
    if page.startswith("examples/"):
        return f"{page.removesuffix('.md')}.py"
    return next((path for path, shown in PAGES.items() if shown == page != "index.md"), f"docs/{page}")


def shown_at(path: str) -> str | None:
    """The file of the site that shows a file of the repository, or None."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/"):
        return f"{path.removesuffix('.py')}.md"
    if path.rstrip("/") == RESULTS:
        return "results/README.md"
    if path.startswith(f"{RESULTS}/"):
        shown = f"results/{path.removeprefix(f'{RESULTS}/')}"
        return shown if shown.endswith(SHOWN) else f"{shown.rstrip('/')}/README.md"
    return None


def rewritten(markdown: str, page: str, known: set[str]) -> str:
    """The text of a page with its links as the site has them; `known`: the files of the site."""
    source, folder = posixpath.dirname(in_repository(page)), posixpath.dirname(page)

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        shown = shown_at(posixpath.normpath(posixpath.join(source, path)))
        if shown not in known:
            if image or not (ROOT / posixpath.normpath(posixpath.join(source, path))).exists():
                raise ValueError(f"{page}: there is no {target}")
            return text if "`" in text else f"`{text}`"
        return f"{image}[{text}]({posixpath.relpath(shown, folder or '.')}{'#' if anchor else ''}{anchor})"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def example(path: Path) -> str:
    """An example as a page: its docstring, and its code."""
    code = path.read_text()
    docstring = ast.get_docstring(ast.parse(code)) or ""
    return f"# {path.name}\n\n{docstring}\n\n```python\n{code[code.index('import') :].strip()}\n```\n"


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / RESULTS).rglob("*")):
        if path.is_file() and path.suffix in SHOWN:
            name = f"results/{path.relative_to(ROOT / RESULTS).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example(path)))
    for source, name in PAGES.items():
        if name != "index.md":
            files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return rewritten(markdown, page.file.src_uri, {file.src_uri for file in files})
