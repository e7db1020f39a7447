"""A comparison as files: index.html (self-contained), results.csv, results.jsonl, figures/*.png.

The page needs nothing beside itself: figures are embedded SVG, the style is inline, no script, no path and no name
of the machine.
"""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import Config, own_options
from ..results import SINGLE_SAMPLES, common, differences, dumps, finite, write_atomic, write_csv, write_text
from . import table
from .figures import Figure, all_figures
from .table import Compared

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: #1a1a1a; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { max-width: 46rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
thead th, .compared td:nth-child(2) { white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
tbody tr + tr td { border-top: 1px solid #e4e4e4; }
tr.section td { font-weight: 600; padding-top: .8rem; }
td.best { font-weight: 700; }
tr.chosen td { background: #e8f1f8; font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.figures.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure.broad { grid-column: 1 / -1; max-width: 48rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #444; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { color: #444; } dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: #f5f5f5; padding: .7rem; font-size: .8rem; line-height: 1.35; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  body { padding: .7rem; font-size: 15px; }
  table { font-size: .8rem; }
  th, td { padding: .2rem .35rem; }
  td:first-child { white-space: normal; min-width: 7rem; }
}
"""


@dataclass(frozen=True)
class Comparison:
    """What a page shows: title, paragraphs of introduction, networks, conditions under which it was run (name ->
    value), and, where a hyper-parameter was chosen, the rows of that choice (loss, value, ..., chosen) and its rule."""

    title: str
    models: list[Compared]
    conditions: dict[str, Any]
    intro: list[str] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)
    tuning_rule: str = ""


def write_report(folder: Path, comparison: Comparison) -> Path:
    """Writes everything into `folder` and returns the page's path."""
    groups = all_figures(comparison.models)
    write_csv(folder / "results.csv", table.flat(comparison.models))
    write_text(folder / "results.jsonl", lines(comparison))
    for figures in groups.values():
        for drawn in figures:
            write_bytes(folder / "figures" / f"{drawn.name}.png", drawn.png)
    write_text(folder / "index.html", page(comparison, groups))
    return folder / "index.html"


def lines(comparison: Comparison) -> str:
    """results.jsonl: the comparison in the first line with what its networks share, then a line for each network; the
    values of single samples are in the figures."""
    found = [finite(_plain(model)) for model in comparison.models]
    first = {item.name: getattr(comparison, item.name) for item in fields(comparison) if item.name != "models"}
    shared = common(*found)
    rows = [{**finite(first), "shared": shared}, *(differences(values, shared) for values in found)]
    return "".join(dumps(row) + "\n" for row in rows)


def _plain(model: Compared) -> dict[str, Any]:
    evaluation = {key: value for key, value in model.evaluation.items() if key not in SINGLE_SAMPLES}
    plain = {"label": model.label, "run": model.run.to_dict(), "evaluation": evaluation}
    return plain if model.timing is None else {**plain, "timing": model.timing}


def write_bytes(path: Path, content: bytes) -> None:
    write_atomic(path, lambda file: file.write(content))


def page(comparison: Comparison, groups: dict[str, list[Figure]]) -> str:
    """The HTML text."""
    title = html.escape(comparison.title)
    body = [f"<h1>{title}</h1>"]
    body += [f"<p>{html.escape(text)}</p>" for text in comparison.intro]
    body += ["<h2>Results</h2>", _results_table(comparison.models)]
    if comparison.tuning:
        body += [
            "<h2>Choice on the validation split</h2>",
            f"<p>{html.escape(comparison.tuning_rule)}</p>",
            _tuning_table(comparison.tuning),
        ]
    for heading, figures in groups.items():
        body += [f"<h2>{html.escape(heading)}</h2>", *gallery(figures)]
    body += ["<h2>How it was run</h2>", description_list(comparison.conditions)]
    body += [config_text(model.label, model.run.config) for model in comparison.models]
    return document(title, body)


def document(title: str, body: list[str]) -> str:
    """A whole page; `title` is escaped already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _results_table(models: list[Compared]) -> str:
    # a word a line, long ones cut at the hyphen, keeps columns as narrow as their numbers
    words = [[w if len(w) < 8 else w.replace("-", "-<br>") for w in html.escape(m.label).split(" ")] for m in models]
    heads = ["<br>".join(parts) for parts in words]
    head = "".join(f"<th>{text}</th>" for text in heads)
    lines = [f"<tr><th></th>{head}</tr>"]
    rows = []
    for section in table.sections(models):
        rows.append(f'<tr class="section"><td colspan="{len(models) + 1}">{html.escape(section.title)}</td></tr>')
        for row in section.rows:
            winners = table.best(row, models)
            cells = "".join(
                f'<td class="best">{table.cell(row, model)}</td>'
                if i in winners
                else f"<td>{table.cell(row, model)}</td>"
                for i, model in enumerate(models)
            )
            rows.append(f"<tr><td>{html.escape(row.label)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><thead>{lines[0]}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _tuning_table(rows: list[dict[str, Any]]) -> str:
    columns = [key for key in rows[0] if key != "chosen"]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        mark = ' class="chosen"' if row["chosen"] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(tuning_cell(row[c]))}</td>" for c in columns) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def tuning_cell(value: Any) -> str:
    """A cell of the tuning table: accuracies as percent, lists joined to three digits."""
    if isinstance(value, list):
        return ", ".join(f"{item:.3g}" for item in value)
    if not isinstance(value, float):
        return str(value)
    return f"{100 * value:.1f} %"


def gallery(figures: list[Figure]) -> list[str]:
    """The figures of one heading, three in a row where there is room, two and four two in a row."""
    kind = "figures wide" if len(figures) in (2, 4) else "figures"
    return [f'<div class="{kind}">', *map(figure, figures), "</div>"]


def figure(drawn: Figure) -> str:
    # an <img>, not inline elements: every matplotlib SVG numbers its ids from one, and two of them in a page would
    # clash
    data = base64.b64encode(drawn.svg.encode()).decode()
    caption = html.escape(drawn.caption)
    image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
    start = '<figure class="broad">' if drawn.broad else "<figure>"
    return f"{start}{image}<figcaption>{caption}</figcaption></figure>"


def description_list(values: dict[str, Any]) -> str:
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in values.items())
    return f"<dl>{items}</dl>"


def config_text(label: str, config: Config) -> str:
    """The config of a network, to be unfolded."""
    import yaml

    text = yaml.safe_dump(own_options(config), sort_keys=False)
    return f"<details><summary>Config of {html.escape(label)}</summary><pre>{html.escape(text)}</pre></details>"
