"""Pages say what their tables hold: a sentence on top, intervals, gamma asked and reached, marks, doubts, labels."""

import html
import json
import math
import re
from dataclasses import replace

import pytest
import scipy.stats
import torch
from support.finished_cells import record
from torch import nn

from margin_kernels.experiments import cli, config, data
from margin_kernels.experiments.config import EvaluationConfig, LossConfig
from margin_kernels.experiments.demo import digits
from margin_kernels.experiments.evaluation import measure, signed_distance
from margin_kernels.experiments.report import (
    choices,
    figures,
    gamma,
    glossary,
    intervals,
    labels,
    page,
    study_page,
    table,
    takeaway,
)
from margin_kernels.experiments.results import MEASURES, RECORDS, Records, Run, Study, Tried, shape
from margin_kernels.experiments.training import reliable, time_steps, timing


def network(label, worst=0.5, clean=0.9, loss=None, timing=None, measured=None, **evaluation):
    """A network of a report with known accuracies on 400 images."""
    keys = ("fgsm_ce", "fgsm_gap", "ifgsm_ce", "ifgsm_gap", "worst")
    values = {"samples": 400, "clean": clean, "eps": 0.1, "curve_eps": [0.0, 0.1], "curves": {}, "distance_p": 2.0}
    values |= {**dict.fromkeys(keys, worst), "distance": {}, **evaluation}
    settings = config.Config(name=label, loss=loss or LossConfig())
    history = [{"epoch": 1, "seconds": 1.0}]
    machine = {"processor": "P", "cores": 2, "torch_threads": 1, "device": "cpu"}
    return table.Compared(label, Run(settings, {}, 1, {}, machine, history, measured or {}), values, timing)


MARGIN = LossConfig(kind="large_margin")


# Newcombe (1998), table I, method 3.
@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_shares_are_those_of_the_literature(hits, count, low, high):
    found = intervals.wilson(hits / count, count)
    assert found == pytest.approx((low, high), abs=5.1e-5)
    assert intervals.wilson(1 - hits / count, count) == pytest.approx((1 - found[1], 1 - found[0]))


def test_figures_show_the_intervals_of_accuracies(monkeypatch):
    drawn = []

    def draw(name, caption, paint):
        figure, axes = figures.plt.subplots()
        paint(axes)
        ((line, _, (bars,)),) = axes.containers
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        drawn.append((name, caption, line.get_ydata().tolist(), ends))
        figures.plt.close(figure)

    monkeypatch.setattr(figures, "draw", draw)
    curves = {"curve_eps": [0.0, 0.1], "curves": {"ifgsm_gap": [0.9, 0.25]}, "counts": {"fgsm": 400, "ifgsm": 100}}
    figures.accuracy_curve([network("a", **curves)], "ifgsm_gap")
    ((name, caption, values, ends),) = drawn
    assert name == "accuracy_ifgsm_gap" and "with 95 % intervals for other test images" in caption
    expected = [intervals.wilson(0.9, 400), intervals.wilson(0.25, 100)]  # IFGSM attacks some of the images
    assert values == pytest.approx([90, 25])
    for end, (low, high) in zip(ends, expected, strict=True):
        assert end == pytest.approx([100 * low, 100 * high])


@pytest.mark.parametrize(("share", "count"), [(1.01, 10), (-0.1, 10), (math.nan, 10), (0.5, 0)])
def test_what_is_no_share_has_no_interval(share, count):
    with pytest.raises(ValueError, match=r"a share must be between 0 and 1 and of at least one image, got .* of "):
        intervals.wilson(share, count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": 1.5}, "evaluation.clean must be between 0 and 1, got 1.5"),
        ({"samples": 0}, "evaluation.samples must be at least 1, got 0"),
        ({"counts": {"fgsm": 0}}, "evaluation.counts.fgsm must be at least 1, got 0"),
        ({"black_box": {"fgsm_ce": -1}}, "evaluation.black_box.fgsm_ce must be between 0 and 1, got -1"),
        ({"noise": [2.0], "noise_sigmas": [0.1]}, r"evaluation.noise\[0\] must be between 0 and 1, got 2.0"),
    ],
)
def test_records_with_shares_that_are_none_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        shape.check_evaluation(network("a", **changes).evaluation, shape.EVALUATION)


def test_intervals_of_means_are_those_of_student():
    values = [1.0, 2.0, 4.0]
    expected = scipy.stats.t.interval(0.95, 2, loc=7 / 3, scale=scipy.stats.sem(values))
    assert intervals.student(values) == pytest.approx(expected)
    assert intervals.student([3.0]) is None and intervals.student([2.0, 2.0]) == (2.0, 2.0)
    assert intervals.apart((0, 1), (1.1, 2)) and not intervals.apart((0, 1), (1, 2))


def test_accuracies_are_shares_of_the_images_that_were_attacked():
    asked = EvaluationConfig(attack_samples=100, ifgsm_samples=30, noise_samples=700)
    old = {"samples": 500}
    counts = {part: intervals.counted(old, asked, part) for part in ("clean", "fgsm", "ifgsm", "worst", "noise")}
    assert counts == {"clean": 500, "fgsm": 100, "ifgsm": 30, "worst": 30, "noise": 500}
    without = replace(asked, ifgsm_samples=0)
    assert intervals.counted(old, without, "worst") == 100
    recorded = {"samples": 500, "counts": {"fgsm": 7, "ifgsm": 0, "noise": 9}}  # what the evaluation says wins
    assert [intervals.counted(recorded, asked, part) for part in ("clean", "fgsm", "worst", "noise")] == [500, 7, 7, 9]


class Flat(nn.Module):
    """A linear classifier of eight by eight images."""

    def __init__(self):
        super().__init__()
        self.flatten, self.head = nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.flatten(x))


@pytest.mark.parametrize("p", [2.0, "inf"])
def test_an_evaluation_counts_its_images_and_measures_what_gamma_asked_for(p):
    torch.manual_seed(0)
    model, split = Flat().eval(), data.load("digits").test.head(60)
    settings = EvaluationConfig(curve=[0.0], deepfool_samples=0, attack_samples=20, ifgsm_samples=5, steps=1)
    loss = LossConfig(kind="large_margin", p=p)
    found = measure.evaluate(model, split, ("flatten",), settings, loss=loss)
    assert found["counts"] == {"fgsm": 20, "ifgsm": 5, "noise": 60}
    distances = signed_distance(model, split, ("flatten",), config.exponent(p))
    assert found["reached"]["p"] == p
    for i, tap in enumerate(("input", "flatten", "output")):
        right = distances[:, i][distances[:, i] > 0]
        assert found["reached"]["median"][tap] == pytest.approx(float(right.median()))
    shape.check_evaluation(found, shape.EVALUATION)
    assert "reached" not in measure.evaluate(model, split, ("flatten",), settings, loss=LossConfig())


def test_the_interval_of_each_accuracy_stands_on_the_page_and_in_the_csv(tmp_path):
    models = [network("plain", 0.5, 0.9), network("margin", 0.75, 0.9, MARGIN)]
    page.write_report(tmp_path, page.Comparison("T", models, {}))
    text = (tmp_path / "index.html").read_text()
    low, high = intervals.wilson(0.75, 400)
    assert f'<td class="best">75.0 %<small>{100 * low:.1f} - {100 * high:.1f}</small></td>' in text
    assert "binomial (Wilson), of this one training run, over 400 test images" in text
    (head, _, second) = (line.split(",") for line in (tmp_path / "results.csv").read_text().splitlines())
    row = dict(zip(head, second, strict=True))
    assert (float(row["worst_low"]), float(row["worst_high"])) == pytest.approx((low, high))
    assert row["model"] == "margin" and "zero_ce_low" not in row


def test_the_sentence_on_top_says_who_is_ahead_and_of_whom_that_cannot_be_told():
    timing = {"ratio": 2.5, "control": 1.01}
    models = [network("cross-entropy", 0.5), network("a", 0.8, 0.96, MARGIN, timing), network("b", 0.76, 0.9, MARGIN)]
    assert takeaway.of_networks(models) == [
        "Under the worst attack of the table (linf, eps = 0.1), a classifies 80.0 % (75.8 to 83.6) of the test images "
        "correctly and cross-entropy 50.0 % (45.1 to 54.9): these 95 % intervals do not overlap.",
        "a cannot be told from b (76.0 %). Without an attack a is better than cross-entropy: 96.0 % against 90.0 %. A "
        "training step of a costs 2.50 times one of cross-entropy. One run each: another seed may change this order.",
    ]
    models[1].evaluation["clean"] = 0.91
    assert (
        "Without an attack a and cross-entropy cannot be told apart: 91.0 % against" in takeaway.of_networks(models)[1]
    )


def test_the_sentence_on_top_says_when_nothing_won():
    near, _ = takeaway.of_networks([network("cross-entropy", 0.5), network("a", 0.52, loss=MARGIN)])
    assert "nothing is clearly ahead of cross-entropy: a classifies 52.0 % (47.1 to 56.9)" in near
    assert near.endswith("and cross-entropy 50.0 % (45.1 to 54.9); these 95 % intervals overlap.")
    below, _ = takeaway.of_networks([network("a", 0.2, loss=MARGIN), network("cross-entropy", 0.5)])
    assert "nothing is ahead of cross-entropy: a classifies 20.0 %" in below and "do not overlap" in below
    assert takeaway.of_networks([network("a", 0.2)])[1] == "There is no other network to compare it with."


def test_what_was_not_measured_alike_is_not_compared():
    other = network("b", eps=0.2)
    assert takeaway.of_networks([network("a"), other]) == [
        "Nothing is compared here: the networks were attacked within different radii, eps = 0.1 and 0.2."
    ]
    (text,) = takeaway.of_networks([network("a"), network("b", samples=10)])
    assert "test splits of 10 and 400 images" in text
    foreign = network("b")
    foreign.run.config.data.name = "mnist"
    assert "measured on different data" in takeaway.of_networks([network("a"), foreign])[0]


def test_a_network_without_attacks_is_compared_by_its_clean_accuracy():
    models = [network("cross-entropy", None, 0.9), network("a", 0.5, 0.99, MARGIN)]
    text = " ".join(takeaway.of_networks(models))
    assert text.startswith("Without an attack, a classifies 99.0 %") and "Under the worst" not in text


def swept(accuracies, budget="cpu"):
    """A study of `accuracies`: (model, point) -> one for each seed."""
    records = [
        record(model, point, seed, clean=value)
        for (model, point), values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return Study("s", budget, records, {})


def test_the_sentence_of_a_sweep_pairs_the_seeds():
    """Differences of -5, -6 and -5.5 points are clear of 0, although the seeds themselves lie 20 points apart."""
    study = swept({("plain", ""): (0.5, 0.6, 0.7), ("margin", ""): (0.55, 0.66, 0.755), ("other", ""): (0.5, 0.7, 0.6)})
    found = {each.model: each for each in takeaway.differences(study, MEASURES[0])}
    assert found["margin"].mean == pytest.approx(-5.5) and found["margin"].clear and not found["other"].clear
    assert found["margin"].interval == pytest.approx(intervals.student([-5, -6, -5.5], 0.975), abs=1e-9)
    first, rule = takeaway.of_study(study)
    low, high = (abs(end) for end in found["margin"].interval)
    assert first == f"Test error, clearly below plain: margin by 5.5 points ({high:.1f} to {low:.1f})."
    assert "paired by seed (Student's t), leaves out 0, for all 2 comparisons together (Bonferroni)" in rule


def test_one_seed_of_a_sweep_is_compared_by_the_intervals_of_its_errors():
    points = {("plain", "a"): (0.5,), ("margin", "a"): (0.9,), ("plain", "b"): (0.5,), ("margin", "b"): (0.6,)}
    first, rule = takeaway.of_study(swept(points))
    assert first == "Test error, clearly below plain: margin at a by 40.0 points."
    assert rule.startswith("Clearly: the 95 % intervals of the two errors (Wilson) do not overlap, for all 2")
    points["margin", "a"] = (0.1,)
    first, _ = takeaway.of_study(swept(points))
    assert first == (
        "Test error: no model is clearly below plain at any of the 2 points. Clearly above it: margin at a by 40.0 "
        "points."
    )
    assert takeaway.of_study(swept({("plain", ""): (0.5,)})) == [
        "There is one model, plain, and nothing to compare it with."
    ]


def test_means_of_a_sweep_have_the_interval_of_student_and_one_seed_that_of_wilson():
    study = swept({("plain", ""): (0.98, 0.96), ("alone", ""): (0.9,)})
    error = MEASURES[0]
    low, high = intervals.student([2.0, 4.0])
    assert low < 0  # an error cannot be
    assert study_page.interval(error, study.of("plain", "")) == pytest.approx((0.0, high))
    expected = [100 * end for end in intervals.wilson(0.1, 50)]
    assert study_page.interval(error, study.of("alone", "")) == pytest.approx(expected)
    margin = next(m for m in MEASURES if m.key == "deepfool_norm")
    assert study_page.interval(margin, study.of("alone", "")) is None
    text = study_page.means(study)
    assert f"<td>3.00 ± 1.41<small>0.00 - {high:.2f}</small></td>" in text
    (note, doubt) = study_page._below(study)
    assert "by Student's t" in note and "binomial (Wilson)" in note and doubt == ""


def test_every_word_of_the_tables_is_in_the_glossary():
    terms = ", ".join(glossary.TERMS)
    both = dict.fromkeys(("fgsm_ce", "fgsm_gap", "ifgsm_ce", "ifgsm_gap"), 0.5)
    model = network("a", saturated=0.0, timing={"ratio": 1.0, "control": 1.0}, noise_sigmas=[0.1], noise=[0.5])
    model.evaluation.update(black_box=both, reverse=both)
    words = [row.label for section in table.sections([model]) for row in section.rows]
    words += [m.heading.removesuffix("%").strip() for m in MEASURES if m.key not in ("epochs", "seconds")]
    for word in words:
        for part in re.split(r" (?=on |FGSM|IFGSM|gap$)", word):
            part = part.removeprefix("relative to image, ").removesuffix(" 0.1")
            assert part in terms or part.removeprefix("of ") in terms, (word, part)
    folded = glossary.unfolding()
    assert folded.startswith('<details class="glossary"><summary>') and " open" not in folded.split(">")[0]
    assert html.escape(glossary.TERMS["rho_adv"]) in folded


def test_gamma_stands_beside_the_distance_that_was_reached():
    taps = {"distance": {"input": 1.0, "relu1": 1.0, "relu2": 1.0, "output": 1.0}}
    reached = {"reached": {"p": 1.0, "median": {"input": 0.5, "relu1": 3.0, "relu2": 1.0, "output": None}}}
    loss = LossConfig(kind="large_margin", p=1.0, gamma=[1.0, 2.0, 4.0], layers=["input", "hidden", "output"])
    line = gamma.of_run("a", network("a", loss=loss).run, {**taps, **reached})
    assert line.norm == "l1"
    assert line.taps == {"input": (1.0, 0.5), "relu1": (2.0, 3.0), "relu2": (2.0, 1.0), "output": (4.0, None)}
    head, lines, columns = gamma.rows([line])
    assert columns == 6 and "<th>relu2</th>" in head
    assert "<td>1<small>0.5 (50 %)</small></td><td>2<small>3 (150 %)</small></td>" in lines[0]
    assert "<td>4<small>not measured</small></td>" in lines[0]
    one = replace(loss, gamma=3.0, layers=["input"])
    assert gamma.of_run("a", network("a", loss=one).run, {**taps, **reached}).taps == {"input": (3.0, 0.5)}
    auto = network("a", loss=replace(one, gamma="auto"), measured={"gamma": [0.7]})
    assert gamma.of_run("a", auto.run, taps).taps == {"input": (0.7, None)}
    unknown = network("a", loss=replace(one, gamma="auto"))
    medians = network("a", loss=replace(one, gamma_unit="median"))  # a multiple of what was not recorded
    for model in (unknown, medians, network("a")):
        assert gamma.of_run("a", model.run, taps) is None
    assert page.gamma_part([], "h2") == []


def test_gamma_of_a_sweep_is_the_mean_over_the_seeds():
    records = []
    for seed, median in enumerate((0.5, 1.5)):
        made = record("margin", "p", seed, distance={"input": 1.0}, reached={"p": 2.0, "median": {"input": median}})
        made.config.loss.kind, made.config.loss.gamma, made.config.loss.layers = "large_margin", 2.0, ["input"]
        records.append(made)
    (line,) = gamma.of_study(Study("s", "cpu", records, {}))
    assert (line.label, line.taps) == ("margin / p", {"input": (2.0, 1.0)})


def test_a_choice_at_the_edge_of_its_grid_says_so():
    def tried(chosen, *values):
        return [Tried({"loss.gamma": value, "loss.p": "inf"}, 0.9, value == chosen, [0]) for value in values]

    assert choices.marks(tried(2, 1, 2, 3)) == ["", "\N{CHECK MARK} chosen", ""]
    assert choices.marks(tried(3, 1, 2, 3)) == ["", "", "\N{CHECK MARK} chosen, edge of the grid"]
    assert choices.marks(tried(1, 1)) == ["the only value tried"]  # one value is no grid
    found = [*choices.marks(tried(2, 1, 2, 3)), *choices.marks(tried(1, 1, 2, 3))]
    assert choices.sentence(found) == "1 of 2 choices lie at the edge of the grid: a wider one may win."
    assert choices.sentence(choices.marks(tried(2, 1, 2, 3))) == ""
    text = study_page.choices_table({("margin", ""): tried(3, 1, 3)})
    assert '<tr class="chosen">' in text and "\N{CHECK MARK} chosen, edge of the grid</td>" in text


def test_the_demo_marks_its_choices_and_the_edges_of_its_grids():
    rows = [{"loss": "a", "value": f"m {i}", "clean": 0.9, "chosen": i == 2, "edge": i == 2} for i in range(3)]
    comparison = page.Comparison("T", [network("a"), network("b")], {}, tuning=rows, tuning_rule="R")
    text = page.page(comparison, {})
    assert text.count('<tr class="chosen">') == 1 and "<td>\N{CHECK MARK} chosen, edge of the grid</td>" in text
    assert "1 of 1 choices lie at the edge of the grid: a wider one may win." in text and "<th>edge</th>" not in text
    alone = page.page(page.Comparison("T", [network("a"), network("b")], {}, tuning=rows[2:], tuning_rule="R"), {})
    assert "<td>the only value tried</td>" in alone and '<tr class="chosen">' not in alone and "edge of" not in alone
    for plan in (digits.FULL, digits.QUICK):
        for grid in (plan.multiples, plan.sensitivity, plan.adversarial, plan.deltas):
            assert list(grid) == sorted(set(grid))  # the first and the last value are the edges
    assert all(len(g) > 2 for g in (digits.FULL.multiples, digits.FULL.sensitivity, digits.FULL.adversarial))


@pytest.mark.parametrize(("scores", "chosen", "edge"), [((0.1, 0.3, 0.2), 1, False), ((0.1, 0.2, 0.3), 2, True)])
def test_the_demo_tells_whether_what_it_chose_is_an_edge(monkeypatch, scores, chosen, edge):
    demo = digits.Demo(digits.FULL, 0, None, data.load("digits"))
    tried = [(f"m {i}", "", LossConfig()) for i in range(3)]
    monkeypatch.setattr(digits, "trials", lambda *given: tried)
    monkeypatch.setattr(digits, "accuracy", lambda *given: 0.9)
    monkeypatch.setattr(demo, "train", lambda label, loss: None)
    attacked = iter(scores)
    monkeypatch.setattr(demo, "validate", lambda trainer: (0.9, next(attacked)))
    baseline = type("Baseline", (), {"model": None})
    _, rows = demo.tune(baseline, "l2 margin")
    assert [row["chosen"] for row in rows] == [i == chosen for i in range(3)]
    assert [row["edge"] for row in rows] == [edge and i == chosen for i in range(3)]


def test_a_timing_is_reliable_where_cross_entropy_takes_as_long_as_itself():
    assert reliable({"ratio": 2.0}) and reliable({"control": 1.09}) and reliable({"control": 0.91})
    assert not reliable({"control": 1.11}) and not reliable({"control": 0.89})
    base = config.parse(["--training.batch_size", "16"])
    timed = time_steps(base, {"same": base}, data.load("digits"), repeats=3)
    assert timed["same"]["control"] > 0


def test_the_control_is_the_second_baseline_to_the_first(monkeypatch):
    """Steps of baseline, config and second baseline take 1, 3 and 2 seconds, whoever is first."""
    order = []

    def seconds(trainer, batch):
        order.append(trainer)
        first = list(dict.fromkeys(order))  # in the first repeat: baseline, config, second baseline
        return [1.0, 3.0, 2.0][first.index(trainer)]

    monkeypatch.setattr(timing, "_seconds", seconds)
    base = config.parse(["--training.batch_size", "16"])
    hinge = replace(base, loss=LossConfig(kind="hinge"))
    found = time_steps(base, {"own": hinge}, data.load("digits"), repeats=4)["own"]
    assert found == {"ms_per_step": 3000.0, "baseline_ms_per_step": 1000.0, "ratio": 3.0, "control": 2.0}
    base_step, own, second = order[:3]
    assert order[3:] == [own, second, base_step, second, base_step, own, base_step, own, second]
    order.clear()
    same = replace(base, name="same")
    assert time_steps(base, {"same": same}, data.load("digits"), repeats=2)["same"]["control"] == 3.0


def test_an_unreliable_timing_is_told_beside_it(capsys):
    quiet, busy = (
        {"ms_per_step": 2.0, "ratio": 2.0, "control": 1.05},
        {"ms_per_step": 3.0, "ratio": 3.0, "control": 1.25},
    )
    models = [network("cross-entropy", 0.5, timing=quiet), network("a", 0.9, loss=MARGIN, timing=busy)]
    text = page.page(page.Comparison("T", models, {}), {})
    doubt = '<small class="doubt">timing unreliable</small>'
    assert f"<td>2.00</td><td>3.00{doubt}</td>" in text and f"<td>2.00x</td><td>3.00x{doubt}</td>" in text
    assert "<td>cross-entropy to itself</td><td>1.05x</td><td>1.25x</td>" in text
    assert "Timing unreliable: a (1.25). In brackets what a second network" in text and "within 10 % of 1" in text
    assert "costs 3.00 times one of cross-entropy, a timing that is not reliable" in text
    assert table.doubts(models[:1]) == ""
    made = replace(record("plain", "", 0), timing=busy, history=[{"epoch": 1, "ms_per_step": 5.0}])
    study = Study("s", "cpu", [made], {})
    assert f"<td>5.0{doubt}</td>" in study_page.means(study)
    assert "Timing unreliable of 1 of 1 cells" in study_page._below(study)[1]


def test_equal_names_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert labels.distinct(["x", "x", "y"], folders) == ["a/run", "b/run", "y"]
    assert labels.distinct(["x", "y", "z"], folders) == ["x", "y", "z"]
    assert labels.distinct(["x", "y", "x"], folders) == ["run", "y", "c"]
    assert labels.distinct(["c", "x", "x"], [tmp_path / "d", tmp_path / "c", tmp_path / "e" / "f"]) == ["d", "c", "e/f"]
    with pytest.raises(ValueError, match=r"folders must be given once each, got .*run 2 times"):
        labels.distinct(["x", "y"], [folders[0], tmp_path / "a" / ".." / "a" / "run"])


def test_cells_of_one_label_are_told_apart_by_their_names(tmp_path, capsys):
    for seed in (0, 1):
        made = record("plain", "", seed, distance_p=2.0, distance={}, worst=0.5)
        Records(tmp_path / RECORDS).put(made)
    cells = [f"{tmp_path / RECORDS}:plain__seed{seed}" for seed in (0, 1)]
    assert cli.main(["report", *cells, "--out", str(tmp_path / "report")]) == 0
    rows = (tmp_path / "report" / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["plain__seed0", "plain__seed1"]
    text = (tmp_path / "report" / "index.html").read_text()
    assert str(tmp_path) not in text and "Config of plain__seed1" in text
    capsys.readouterr()
    assert cli.main(["report", cells[0], cells[0], "--out", str(tmp_path / "report")]) == 1
    assert "folders must be given once each" in capsys.readouterr().err
    assert cli.main(["evaluate", "run", "./run"]) == 1  # before anything is measured
    assert "folders must be given once each, got run 2 times" in capsys.readouterr().err


def test_sweeps_of_one_name_in_folders_of_one_name_keep_their_figures_apart(tmp_path):
    for above in ("a", "b"):
        for model in ("plain", "hinge"):
            Records(tmp_path / above / "out" / RECORDS).put(record(model, "", 0))
        (tmp_path / above / "out" / "summary.json").write_text(json.dumps({"sweep": "s", "budget": "full"}))
    folders = [str(tmp_path / above / "out") for above in ("a", "b")]
    assert cli.main(["report", *folders, "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert "<h2>a/out</h2>" in text and "<h2>b/out</h2>" in text
    stems = {path.stem for path in (tmp_path / "report" / "figures").iterdir()}
    assert stems == {"a_out_error", "b_out_error"}


def test_only_the_full_budget_is_comparable_to_published_values():
    for budget, expected in (("full", True), ("paper", True), ("cpu", False), ("quick", False), ("unknown", False)):
        assert swept({("plain", ""): (0.5,)}, budget).comparable is expected
    study = replace(swept({("plain", ""): (0.9,)}), published={("plain", ""): {"error": 5.0}})
    text = "\n".join(study_page.section(study, {}, ""))
    assert '<td>5<small class="doubt">not comparable</small></td>' in text
    assert "Not comparable: budget cpu, and not the paper's, which is full." in html.unescape(text)
    full = "\n".join(study_page.section(replace(study, budget="full"), {}, ""))
    assert "<td>5</td>" in full and "omparable" not in full


def test_a_wide_table_scrolls_in_its_box_and_says_so_on_a_phone():
    wide, narrow = page.scrolled("<th></th>", [], 4), page.scrolled("<th></th>", [], 3)
    assert "Swipe the table sideways" in wide and "Swipe" not in narrow
    for text in (wide, narrow):
        assert '<div class="scroll" tabindex="0"><table' in text
    text = page.document("T", [])
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", text) and re.search(r"first-child[^}]*position: sticky", text)
    assert ".more { display: none; }" in text and "<script" not in text


def test_figures_are_vector_graphics_on_the_page_and_beside_it(tmp_path):
    models = [network("a", curves={"ifgsm_gap": [0.9, 0.5]}), network("b", curves={"ifgsm_gap": [0.9, 0.4]})]
    page.write_report(tmp_path, page.Comparison("T", models, {}))
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/svg+xml") == 1 and "data:image/png" not in text
    assert (tmp_path / "figures" / "accuracy_ifgsm_gap.svg").read_text().startswith("<?xml")
    assert (tmp_path / "figures" / "accuracy_ifgsm_gap.png").is_file()


def test_what_has_many_points_is_pixels_within_the_vector_graphic():
    def drawn(count):
        def paint(axes):
            axes.plot(range(count), [i % 7 for i in range(count)])
            axes.scatter(range(count), range(count))

        return figures.draw("many", "", paint).svg

    few, many = drawn(50), drawn(figures.POINTS + 1)
    assert "<image" not in few and many.count("<image") == 1 and len(many) < 2 * len(few)
