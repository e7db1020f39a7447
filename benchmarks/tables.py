"""The tables of the pages, as Markdown, from benchmarks/results/ and the options of the experiments.

    python benchmarks/tables.py            prints all tables under their names
    python benchmarks/tables.py --read TAR    the tables of results.tar, which benchmarks/run_gpu.sh wrote
    python benchmarks/tables.py --write    puts them into the pages, between `<!-- table NAME -->` and `<!-- /table -->`

`<!-- table papers/SWEEP error deepfool_norm -->` is a sweep's table of these measures, `choices` in their place what
its models have chosen on validation images. A test holds the pages to the results.
"""

import argparse
import csv
import dataclasses
import inspect
import json
import re
import tarfile
from pathlib import Path

import docstring_parser

from margin_kernels.experiments import config, sweeps
from margin_kernels.experiments.results import MEASURES, RECORDS, Records

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parents[1]
PAGES = (
    ROOT / "README.md",
    *(RESULTS / name / "README.md" for name in (".", "papers", "presets")),
    *(ROOT / "docs" / f"{name}.md" for name in ("experiments", "losses/adversarial", "losses/one-to-n")),
    *(ROOT / "docs" / f"{name}.md" for name in ("losses/sensitivity", "papers", "performance")),
)
BLOCK = re.compile(r"(<!-- table (\S+)((?: \S+)*) -->\n).*?(<!-- /table -->)", re.DOTALL)
# Step tables that are also shown side by side.
OVERVIEW = ("step_cpu", "step_cpu_resnet20", "step_cpu_large", "step_cpu_resnet50")
OVERVIEW_NETWORKS = ("mnist_cnn", "mlp800", "resnet20_gn", "wrn28_10_gn", "resnet50_gn", "resnet50_bn", "vit_b16")
OVERVIEW_STEPS = (
    "large margin, k = 1, hidden, split",
    "large margin, k = 1, input + hidden, split",
    "large margin + CE, k = 1, input + hidden, loop",
    "large margin, k = 1, input + hidden, baseline",
    "large margin, 2nd order, k = 1, input + hidden, split",
    "large margin, 2nd order, k = 1, input + hidden, loop",
    "large margin, 2nd order, k = 1, input + hidden, baseline",
    "sensitivity, 1 candidate, 2nd order, k = 1, input, split",
    "sensitivity, 1 candidate, 2nd order, k = 1, input, loop",
    "1-to-N",
)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def dual_norm(run: dict) -> str:
    """Share of one core's copy bandwidth, ours / torch.linalg.vector_norm."""
    ps = ["1", "2", "3", "4", "inf"]
    rows: dict[tuple, dict[str, str]] = {}
    for cell in run["dual_norm"]:
        key = (cell["dtype"], f"{cell['length']:,}")
        rows.setdefault(key, {})[str(cell["p"])] = f"{100 * cell['share']:.0f} / {100 * cell['torch_share']:.0f}"
    ordered = sorted(rows.items(), key=lambda item: item[0][0], reverse=True)
    return table(
        ["dtype", "elements per row", *(f"p = {p}" for p in ps)],
        [[*key, *(cells[p] for p in ps)] for key, cells in ordered],
    )


def dual_norm_exponents(run: dict) -> str:
    """Share of one core's copy bandwidth, the norms / their derivative."""
    rows: dict[tuple, dict[str, str]] = {}
    for cell in run["dual_norm_exponents"]:
        key = (cell["dtype"], f"{cell['length']:,}")
        rows.setdefault(key, {})[cell["q"]] = f"{100 * cell['share']:.0f} / {100 * cell['backward_share']:.0f}"
    ordered = sorted(rows.items(), key=lambda item: item[0][0], reverse=True)
    exponents = list(ordered[0][1])
    return table(
        ["dtype", "elements per row", *(f"q = {q}" for q in exponents)],
        [[*key, *(cells[q] for q in exponents)] for key, cells in ordered],
    )


def competitors(run: dict) -> str:
    rows = [
        [
            f"{cell['n']} x {cell['classes']}",
            cell["dtype"],
            str(cell["threads"]),
            str(cell["k"]),
            f"{cell['milliseconds']:.1f}",
            f"{cell['to_cross_entropy']:.2f}",
            f"{cell['to_eager']:.2f}",
        ]
        for cell in run["competitors"]
    ]
    return table(["N x C", "dtype", "threads", "k", "ms", "to cross_entropy", "to eager composition"], rows)


def row_distance(run: dict) -> str:
    rows = [
        [
            f"{cell['classes']:,} x {cell['features']}",
            str(cell["p"]),
            f"{cell['microseconds']:.0f}",
            f"{cell['GB_per_s']:.1f}",
            f"{100 * cell['share']:.0f}",
            f"{cell['to_eager']:.2f}",
        ]
        for cell in run["row_distance"]
    ]
    return table(["rows", "p", "us", "GB/s", "% of copy", "to eager composition"], rows)


def one_to_n(run: dict) -> str:
    rows = [
        [
            f"{cell['n']} x {cell['classes']}",
            cell["dtype"],
            str(cell["threads"]),
            f"{cell['milliseconds']:.2f}",
            f"{cell['to_cross_entropy']:.2f}",
            f"{cell['with_cross_entropy_to_cross_entropy']:.2f}",
            f"{cell['to_pairs']:.3f}",
        ]
        for cell in run["one_to_n"]
    ]
    head = [
        "N x C",
        "dtype",
        "threads",
        "ms",
        "to cross_entropy",
        "with the CE term, to cross_entropy",
        "to N x N form",
    ]
    return table(head, rows)


def deepfool_step(run: dict) -> str:
    rows = [
        [
            f"{cell['n']} x {cell['k']} x {cell['length']}",
            str(cell["p"]),
            f"{cell['microseconds']:.0f}",
            f"{cell['GB_per_s']:.1f}",
            f"{cell['to_eager']:.2f}",
        ]
        for cell in run["deepfool_step"]
    ]
    return table(["N x k x D", "p", "us", "GB/s", "to eager composition"], rows)


def step_loss(cell: dict) -> str:
    order = "2nd order" if cell["order"] == 2 and "adversarial" not in cell["loss"] else ""
    k = f"k = {cell['k']}" if cell["k"] else ""
    return ", ".join(filter(None, (cell["loss"], order, k)))


def step_label(cell: dict) -> str:
    return ", ".join(filter(None, (step_loss(cell), cell["taps"], cell["passes"])))


def step_ratios(run: dict) -> str:
    """Time to cross-entropy and, in brackets, that of the floor: a column for each network and number of threads."""
    columns: dict[str, dict[str, str]] = {}
    labels: dict[str, None] = {}
    for part in run["networks"]:
        column = columns.setdefault(f"{part['network']}, {part['threads']} thr.", {})
        for cell in part["steps"]:
            labels[step_label(cell)] = None
            column[step_label(cell)] = (
                "refused"
                if "refused" in cell
                else f"{cell['to_cross_entropy']:.2f} ({cell['floor_to_cross_entropy']:.2f})"
            )
    rows = [[label, *(column.get(label, "-") for column in columns.values())] for label in labels]
    return table(["loss, taps, passes", *columns], rows)


def overview(runs: list[dict]) -> str:
    """Some steps with one competitor, in fp32, over networks of several runs, each with most threads."""
    parts: dict[str, dict] = {}
    for part in (part for run in runs for part in run["networks"]):
        known = parts.get(part["network"])
        if part["dtype"] == "float32" and (known is None or part["threads"] > known["threads"]):
            parts[part["network"]] = part
    chosen = [
        {**parts[name], "steps": [cell for cell in parts[name]["steps"] if step_label(cell) in OVERVIEW_STEPS]}
        for name in OVERVIEW_NETWORKS
    ]
    return step_ratios({"networks": chosen})


def compiled_ratios(run: dict) -> str:
    """Compiled steps: time to eager, and to compiled cross-entropy."""
    rows = [
        [
            part["network"],
            step_label(cell),
            f"{cell['milliseconds']:.1f}",
            f"{cell['compiled']['milliseconds']:.1f}",
            f"{cell['compiled']['to_eager']:.2f}",
            f"{cell['compiled']['to_compiled_cross_entropy']:.2f}",
        ]
        for part in run["networks"]
        for cell in part["steps"]
        if isinstance(cell.get("compiled"), dict)
    ]
    head = ["network", "loss, taps, passes", "eager ms", "compiled ms", "to eager", "to compiled cross-entropy"]
    return table(head, rows) if rows else ""


def steps(run: dict) -> dict[str, str]:
    """All ratios at a glance, compiled steps, and one table for each network and number of threads."""
    tables = {"ratios": step_ratios(run)}
    if at_a_glance := compiled_ratios(run):
        tables["compiled"] = at_a_glance
    for part in run["networks"]:
        rows = []
        for cell in part["steps"]:
            label = [step_loss(cell), cell["taps"], cell["passes"]]
            if "refused" in cell:
                rows.append([*label, cell["refused"], *[""] * 7])
                continue
            compiled = cell.get("compiled")
            rows.append(
                [
                    *label[:2],
                    label[2] + (" *" if cell["auto"] else ""),
                    f"{cell['milliseconds']:.1f}",
                    f"{cell['to_floor']:.2f}",
                    f"{cell['to_cross_entropy']:.2f}",
                    f"{cell['floor_to_cross_entropy']:.2f}",
                    f"{cell['flops_to_cross_entropy']:.2f}",
                    f"{cell['memory_to_cross_entropy']:.2f}",
                    f"{cell['number_of_passes']:g}",
                    f"{compiled['to_compiled_cross_entropy']:.2f}" if isinstance(compiled, dict) else "-",
                ]
            )
        head = ["loss", "taps", "passes (*: auto)", "ms", "to its floor", "to cross-entropy", "floor to cross-entropy"]
        head += ["FLOPs to cross-entropy", "memory to cross-entropy", "passes of the network", "compiled to compiled"]
        layout = ", channels-last" if part["channels_last"] else ""
        name = f"{part['network']}, batch {part['batch']}, {part['dtype']}{layout}, {part['threads']} threads"
        tables[f"{name}, {part['device']}"] = table(head, rows)
    return tables


def losses(run: dict) -> str:
    """Time / peak memory of a step relative to cross-entropy, one column for each network and number of threads."""
    columns = list(dict.fromkeys((cell["network"], cell["threads"]) for cell in run["steps"]))
    rows: dict[str, dict[tuple, str]] = {}
    for cell in run["steps"]:
        text = f"{cell['time_to_cross_entropy']:.2f} / {cell['memory_to_cross_entropy']:.1f}"
        rows.setdefault(cell["loss"], {})[cell["network"], cell["threads"]] = text
    head = [f"{network}, {threads} thread{'s' if threads > 1 else ''}" for network, threads in columns]
    return table(["loss", *head], [[name, *(cells[c] for c in columns)] for name, cells in rows.items()])


COLUMNS = {  # measure of a summary -> heading, factor, digits
    "error": ("error %", 100, 2),
    "fgsm_error": ("FGSM error %", 100, 1),
    "fgsm_gap_error": ("FGSM gap error %", 100, 1),
    "ifgsm_gap_error": ("IFGSM gap error %", 100, 1),
    "black_box_fgsm_error": ("black box FGSM error %", 100, 1),
    "black_box_ifgsm_gap_error": ("black box IFGSM gap error %", 100, 1),
    "deepfool_norm": ("margin", 1, 2),
    "rho_adv": ("10 rho_adv", 10, 2),
}
SHOWN = ("error", "fgsm_error", "ifgsm_gap_error", "deepfool_norm", "rho_adv")


def published(folder: str) -> tuple[str, dict[str, str]]:
    """What the paper prints for the models of the sweep with whose name `folder` begins: a heading, "" where there is
    nothing, and a text for each model."""
    file = max((name for name in sweeps.shipped() if folder.startswith(name)), key=len, default=None)
    values = {} if file is None else sweeps.published(sweeps.shipped()[file])
    shown = [key for key in COLUMNS if any(key in known for known in values.values())]
    units = {measure.key: measure.factor for measure in MEASURES}  # published errors are in % already
    texts = {
        model: ", ".join(
            f"{COLUMNS[key][1] / units[key] * known[key]:.{COLUMNS[key][2]}f}" for key in shown if key in known
        )
        for (model, _), known in values.items()
    }
    return ("published " if shown else "") + ", ".join(COLUMNS[key][0] for key in shown), texts


def sweep(path: Path, shown: tuple[str, ...] = SHOWN) -> str:
    """One row per model and point of a sweep's summary.csv: means, with standard deviations over seeds, and what the
    paper prints."""
    heading, known = published(path.parent.name)
    if shown != SHOWN:
        heading = ""
    rows = []
    for row in csv.DictReader(path.open()):
        cells = []
        for key in shown:
            _, factor, digits = COLUMNS[key]
            mean, std = row.get(f"{key}_mean"), row.get(f"{key}_std")
            text = f"{factor * float(mean):.{digits}f}" if mean else "-"
            cells.append(f"{text} ± {factor * float(std):.{digits}f}" if mean and std else text)
        label = ", ".join(filter(None, (row["point"], row["model"])))
        rows.append([label, row["seeds"], *cells, *([known.get(row["model"]) or "-"] if heading else [])])
    return table(["model", "runs", *(COLUMNS[key][0] for key in shown), *filter(None, [heading])], rows)


MANY = 12  # rows from which a sweep over several points is better read as a grid


def by_point(path: Path) -> str:
    """A row for each model of a sweep's summary.csv, a pair of columns for each point: error and FGSM gap error, %."""
    rows = list(csv.DictReader(path.open()))
    points = list(dict.fromkeys(row["point"] for row in rows))
    found = {(row["model"], row["point"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for point in points:
            row = found.get((model, point))
            shares = [("error_mean", 2), ("fgsm_gap_error_mean", 1)]
            cells += ["-" if row is None else f"{100 * float(row[key]):.{digits}f}" for key, digits in shares]
        lines.append([model, *cells])
    heads = [head for point in points for head in (f"{point}: error %", "FGSM gap error %")]
    return table(["model", *heads], lines)


def by_model(path: Path) -> str:
    """A row for each point of a sweep's summary.csv, a column for each model: accuracy, clean and under FGSM on the
    gap, % and its standard deviation over the seeds."""
    rows = list(csv.DictReader(path.open()))
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        shares = []
        for key in ("error", "fgsm_gap_error"):
            text = f"{100 - 100 * float(row[f'{key}_mean']):.1f}"
            shares.append(f"{text} ± {100 * float(std):.1f}" if (std := row[f"{key}_std"]) else text)
        lines.setdefault(row["point"], [row["point"]]).append(" / ".join(shares))
    return table(["", *models], list(lines.values()))


def choices(folder: Path) -> str:
    """What each model of a sweep has chosen at each point, among what, and the validation accuracy of it, %."""
    rows: dict[str, dict[str, str]] = {}
    among: dict[str, str] = {}
    for record in sorted(Records(folder / RECORDS).all(), key=lambda record: record.cell):
        best = next(tried for tried in record.choice if tried.chosen)
        values: dict[str, list[str]] = {}
        for tried in record.choice:
            for key, value in tried.values.items():
                values.setdefault(key.rsplit(".", 1)[-1], []).append(f"{value}")
        among[record.model] = "; ".join(f"{key} {', '.join(dict.fromkeys(found))}" for key, found in values.items())
        chosen = ", ".join(f"{value}" for value in best.values.values())
        rows.setdefault(record.model, {})[record.point] = f"{chosen} ({100 * best.validation_accuracy:.1f})"
    order = list(csv.DictReader((folder / "summary.csv").open()))
    points = list(dict.fromkeys(row["point"] for row in order))
    models = list(dict.fromkeys(row["model"] for row in order))
    return table(["model", "among", *points], [[m, among[m], *(rows[m][p] for p in points)] for m in models])


def is_grid(path: Path) -> bool:
    rows = list(csv.DictReader(path.open()))
    return len({row["point"] for row in rows}) > 1 and len(rows) > MANY


def overhead(run: dict) -> str:
    return table(["call", "microseconds"], [[n, f"{v:.1f}"] for n, v in run["overhead_microseconds"].items()])


def monitor(run: dict) -> str:
    rows = {}
    for cell in run["monitor"]:
        row = rows.setdefault((cell["network"], cell["taps"]), [cell["network"], cell["taps"], str(cell["batch"])])
        row.append(f"{cell['ratio']:.3f} ({cell['plain']:.3f})")
    threads = list(dict.fromkeys(cell["threads"] for cell in run["monitor"]))
    return table(["network", "layers", "batch", *(f"{n} thread{'s'[: n > 1]}" for n in threads)], list(rows.values()))


def predicted(run: dict) -> str:
    """ptx_model.py: what a GPU would take, and why not less."""
    own = ("op", "microseconds", "share", "reason", "kernels", "dtype")
    rows = []
    for cell in run["predicted"]:
        case = ", ".join(f"{key} {value}" for key, value in cell.items() if key not in own)
        rows.append(
            [cell["op"], case.replace("taken", "k"), cell["dtype"], f"{cell['microseconds']:.1f}",
             f"{100 * cell['share']:.0f}", cell["reason"] or "-"]
        )  # fmt: skip
    return table(["op", "case", "dtype", "us, predicted", "% of copy, predicted", "what keeps it below 85 %"], rows)


# The parts of a results file and their tables.
PARTS = {
    "predicted": predicted,
    "dual_norm": dual_norm,
    "dual_norm_exponents": dual_norm_exponents,
    "competitors": competitors,
    "row_distance": row_distance,
    "one_to_n": one_to_n,
    "deepfool_step": deepfool_step,
    "overhead_microseconds": overhead,
    "monitor": monitor,
}


def gpu_rows(run: dict) -> str:
    """kernels_gpu.py: a row for each call."""
    own = ("what", "microseconds", "share_of_copy", "launches_forward", "launches_forward_backward")
    rows = []
    for cell in run["rows"]:
        case = ", ".join(
            f"{key} {value}" for key, value in cell.items() if key not in own and not key.startswith("to_")
        )
        ratios = ", ".join(
            f"{value:.2f} {key.removeprefix('to_')}" for key, value in cell.items() if key.startswith("to_")
        )
        share = f"{100 * cell['share_of_copy']:.0f}" if "share_of_copy" in cell else "-"
        time = f"{cell['microseconds']:.1f}" if "microseconds" in cell else "-"
        launches = (
            f"{cell['launches_forward']} / {cell['launches_forward_backward']}" if "launches_forward" in cell else "-"
        )
        rows.append([case, cell["what"], time, share, ratios or "-", launches])
    return table(["case", "call", "us", "% of copy", "to", "launches"], rows)


def read(archive: Path) -> dict[str, str]:
    """The tables of an archive of benchmarks/run_gpu.sh, by name of file and part, also of a run that was stopped."""
    found: dict[str, str] = {}
    with tarfile.open(archive) as files:
        for member in files:
            content = files.extractfile(member)
            if content is None or not member.name.endswith(".json"):
                continue
            stem, run = Path(member.name).stem, json.load(content)
            if stem.startswith("summary"):
                rows = [[name, str(cell["exit"]), str(cell["seconds"])] for name, cell in run.items()]
                found[stem] = table(["stage", "exit code", "seconds"], rows)
            elif "rows" in run:
                found[stem] = gpu_rows(run) + "".join(f"\n\n{name}: {text}" for name, text in run["failures"].items())
            elif "networks" in run:
                found |= {f"{stem}/{part}": text for part, text in steps(run).items()}
            else:
                found[stem] = losses(run)
    return found


def robustness(path: Path) -> str:
    """One row per trained network, from the results.csv that `margin-kernels demo` and `report` write."""
    percent = ("clean", "fgsm_ce", "fgsm_gap", "ifgsm_ce", "ifgsm_gap")
    rows = []
    for row in csv.DictReader(path.open()):
        shares = [f"{100 * float(row[name]):.1f}" for name in percent]
        zero = f"{100 * float(row['zero_ce']):.1f} / {100 * float(row['zero_gap']):.1f}"
        ratio = f"{float(row['ratio']):.1f}" if row.get("ratio") else "-"
        rows.append([row["model"], *shares, zero, f"{float(row['deepfool_norm_correct']):.2f}", ratio])
    head = ["loss", "clean %", "FGSM on CE", "FGSM on gap", "IFGSM on CE", "IFGSM on gap", "zero gradients %"]
    return table([*head, "DeepFool l2", "step to CE"], rows)


def toy(run: dict) -> str:
    """The smallest distance of a training point to the exact boundary, and the one that DeepFool reports."""
    networks = list(dict.fromkeys(row["network"] for row in run["models"]))
    rows: dict[str, list[str]] = {}
    for row in run["models"]:
        rows.setdefault(row["model"], [row["model"]]).extend(
            f"{row[key]:.2f}" for key in ("margin", "deepfool_training")
        )
    return table(
        ["loss", *(head for name in networks for head in (f"{name}: margin", "DeepFool"))], list(rows.values())
    )


def options_of(section: type) -> str:
    """A row for each option of a section of the experiments' config that is no section itself: from the dataclass."""
    described = docstring_parser.parse(inspect.cleandoc(section.__doc__ or ""))
    meanings = {entry.arg_name: " ".join((entry.description or "").split()) for entry in described.params}
    rows = []
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.default_factory):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = meanings[field.name].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        rows.append([f"`{field.name}`", f"`{json.dumps(default)}`", text])
    return table(["option", "default", "meaning"], rows)


def options() -> dict[str, str]:
    """The sections of the experiments' config, by dotted name."""
    found: dict[str, str] = {}

    def add(section: type, name: str) -> None:
        found[f"options/{name}"] = options_of(section)
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.default_factory):
                add(field.default_factory, f"{name}.{field.name}")

    for field in dataclasses.fields(config.Config):
        if dataclasses.is_dataclass(field.default_factory):
            add(field.default_factory, field.name)
    return found


def all_tables() -> dict[str, str]:
    """Every table by its name."""
    tables = options()
    for name in ("digits", "mnist"):
        path = RESULTS / name / "results.csv"
        if path.is_file():
            tables[name] = robustness(path)
    for path in sorted((RESULTS / "papers").glob("*/summary.csv")):
        tables[f"papers/{path.parent.name}"] = (by_point if is_grid(path) else sweep)(path)
    for path in sorted((RESULTS / "presets").glob("*/summary.csv")):
        tables[f"presets/{path.parent.name}"] = by_model(path)
    tables["papers/toy"] = toy(json.loads((RESULTS / "papers" / "toy" / "toy.json").read_text()))
    tables["overview"] = overview([json.loads((RESULTS / f"{name}.json").read_text()) for name in OVERVIEW])
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text())
        found = {part: as_table(run) for part, as_table in PARTS.items() if part in run}
        if "networks" in run:
            found |= steps(run)
        if path.stem == "losses_cpu":
            found["losses"] = losses(run)
        tables |= {f"{path.stem}/{part}": text for part, text in found.items()}
    return tables


def filled(page: str, tables: dict[str, str]) -> str:
    """The text of a page with the tables of today in its blocks. Raises KeyError for a table that there is not."""

    def block(match: re.Match[str]) -> str:
        begin, name, measures, end = match.groups()
        if measures.strip() == "choices":
            text = choices(RESULTS / name)
        else:
            text = sweep(RESULTS / name / "summary.csv", tuple(measures.split())) if measures else tables[name]
        return f"{begin}\n{text}\n\n{end}"

    return BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of benchmarks/results/ as Markdown.")
    parser.add_argument("--write", action="store_true", help="put them into the pages instead of printing them")
    parser.add_argument("--read", type=Path, metavar="TAR", help="print those of an archive of run_gpu.sh instead")
    options = parser.parse_args()
    tables = all_tables() if options.read is None else read(options.read)
    if options.write and options.read is None:
        for page in PAGES:
            page.write_text(filled(page.read_text(), tables))
        return
    for name, text in tables.items():
        print(f"## {name}\n\n{text}\n")


if __name__ == "__main__":
    main()
