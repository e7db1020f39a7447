"""A comparison as files: index.html (self-contained), results.csv, results.jsonl, figures/*.svg and *.png.

The page needs nothing beside itself: figures are embedded SVG, the style is inline, no script, no path and no name
of the machine.
"""

from __future__ import annotations

import base64
import html
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import Config, own_options
from ..results import SINGLE_SAMPLES, common, differences, dumps, finite, write_atomic, write_csv, write_text
from . import choices, gamma, glossary, table, takeaway
from .figures import Figure, all_figures
from .style import STYLE
from .table import Compared

PHONE = 3  # columns that a phone shows without scrolling


@dataclass(frozen=True)
class Comparison:
    """What a page shows: title, paragraphs of introduction, networks, conditions under which it was run (name ->
    value), and, where a hyper-parameter was chosen, the rows of that choice (loss, value, ..., chosen, edge: whether it
    is the first or last value of its grid) and its rule."""

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
            write_text(folder / "figures" / f"{drawn.name}.svg", drawn.svg)
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
    body = [f"<h1>{title}</h1>", takeaways(takeaway.of_networks(comparison.models))]
    body += [f"<p>{html.escape(text)}</p>" for text in comparison.intro]
    body += ["<h2>Results</h2>", _results_table(comparison.models), *notes(_below(comparison.models))]
    body.append(glossary.unfolding())
    body += gamma_part(gamma.of_networks(comparison.models), "h2")
    if comparison.tuning:
        body += [
            "<h2>Choice on the validation split</h2>",
            f"<p>{html.escape(comparison.tuning_rule)}</p>",
            _tuning_table(comparison.tuning),
            *notes([choices.sentence(tuning_marks(comparison.tuning))]),
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


def takeaways(sentences: list[str]) -> str:
    """What the tables say, at the top of a page."""
    lines = (html.escape(text).replace(" %", "&nbsp;%") for text in sentences)
    return f'<div class="takeaway">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def notes(sentences: list[str]) -> list[str]:
    """What stands below a table; empty sentences are left out."""
    return [f'<p class="note">{html.escape(text)}</p>' for text in sentences if text]


def scrolled(head: str, lines: list[str], columns: int, kind: str = "") -> str:
    """A table in a box in which it scrolls sideways; where a phone cannot show all columns, a line above says so."""
    more = (
        '<p class="more">Swipe the table sideways for more columns \N{RIGHTWARDS ARROW}</p>' if columns > PHONE else ""
    )
    return (
        f'{more}<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def section_line(title: str, columns: int) -> str:
    """A line of a table that heads those below it."""
    return f'<tr class="section"><td colspan="{columns}"><span>{html.escape(title)}</span></td></tr>'


def gamma_part(lines: list[gamma.Reached], heading: str) -> list[str]:
    """The table of what gamma asked for and what was reached, where a loss has gamma."""
    if not lines:
        return []
    return [f"<{heading}>Gamma, asked and reached</{heading}>", scrolled(*gamma.rows(lines)), *notes([gamma.NOTE])]


def _results_table(models: list[Compared]) -> str:
    # a word a line, long ones cut at the hyphen, keeps columns as narrow as their numbers
    words = [[w if len(w) < 8 else w.replace("-", "-<br>") for w in html.escape(m.label).split(" ")] for m in models]
    head = "<th></th>" + "".join(f"<th>{'<br>'.join(parts)}</th>" for parts in words)
    lines = []
    for section in table.sections(models):
        lines.append(section_line(section.title, len(models) + 1))
        for row in section.rows:
            winners = table.best(row, models)
            cells = "".join(_results_cell(row, model, i in winners) for i, model in enumerate(models))
            lines.append(f"<tr><td>{html.escape(row.label)}</td>{cells}</tr>")
    return scrolled(head, lines, len(models) + 1)


def _results_cell(row: table.Row, model: Compared, best: bool) -> str:
    """A value with the interval of an accuracy, or with the doubt about a timing."""
    small = ""
    if (found := table.interval(row, model)) is not None:
        small = f"<small>{100 * found[0]:.1f} - {100 * found[1]:.1f}</small>"
    elif row.key in table.TIMED and table.unreliable(model):
        small = f'<small class="doubt">{table.UNRELIABLE}</small>'
    start = '<td class="best">' if best else "<td>"
    return f"{start}{table.cell(row, model)}{small}</td>"


def _below(models: list[Compared]) -> list[str]:
    """What is to be said of the numbers of the results."""
    return [
        "Bold: the best of a row. Small, below an accuracy: its 95 % interval, binomial (Wilson), of this one training "
        f"run, over {table.images_words(models)}. It is about other test images, not about other seeds.",
        table.doubts(models),
    ]


def _tuning_table(rows: list[dict[str, Any]]) -> str:
    columns = [key for key in rows[0] if key not in ("chosen", "edge")]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in [*columns, ""])
    lines = []
    for row, mark in zip(rows, tuning_marks(rows), strict=True):
        style = ' class="chosen"' if choices.CHOSEN in mark else ""
        cells = [*(tuning_cell(row[column]) for column in columns), mark]
        lines.append(f"<tr{style}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return scrolled(head, lines, len(columns) + 1)


def tuning_marks(rows: list[dict[str, Any]]) -> list[str]:
    """What marks each row of the tuning table: whether its value was chosen, and lies at the edge of its grid."""
    tried = Counter(row["loss"] for row in rows)
    return [choices.mark(row["chosen"], row.get("edge", False), tried[row["loss"]]) for row in rows]


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
