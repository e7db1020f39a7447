"""The pictures of the site show what the library computes."""

import re

import pictures
import pytest
import torch
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from support import ROOT


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def lines(axes):
    return {line.get_label(): torch.tensor(line.get_xydata()) for line in axes.lines}


def test_the_term_of_the_large_margin_loss_is_the_hinge_and_alpha_bounds_it():
    drawn = lines(pictures.large_margin().axes[0])
    d, free = drawn["alpha = None"].T
    torch.testing.assert_close(free, (1 - d).clamp(min=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn["alpha = 1"][:, 1], (1 - d).clamp(0, 1), rtol=0, atol=1e-6)


def test_sensitivity_lowers_the_norm_where_the_points_are():
    x, y = pictures.moons()
    found = []
    for weight in (0.0, 0.1):
        loss = pictures.mk.MarginSensitivityLoss(weight=weight)
        found.append(pictures.mk.MarginTask(pictures.trained(loss, steps=200), loss).evaluate(x, y)["norm"].mean())
    assert found[1] < 0.7 * found[0]


def test_the_terms_of_adversarial_margins_are_the_formulas():
    drawn = lines(pictures.adversarial().axes[0])
    for label, formula in (
        ('"lin", c = 2', lambda m: -64 * m),
        ('"exp", c = 25', lambda m: 32 * (-25 * m).exp()),
        ('"inv", c = 2', lambda m: 32 / (1 + 2 * m)),
    ):
        m, term = drawn[label].T
        torch.testing.assert_close(term, formula(m), rtol=1e-3, atol=1e-4)


def test_the_slope_of_1_to_n_ends_at_delta():
    slopes = pictures.one_to_n().axes[1].lines
    for delta, line in zip((1.0, 5.0, 10.0), slopes, strict=True):
        score, slope = torch.tensor(line.get_xydata()).T
        assert (slope[score > delta + 0.05] == 0).all() and (slope[score < delta - 0.05] < 0).all()


def test_a_step_is_as_wide_as_its_passes():
    widths: dict[float, float] = {}
    for patch in pictures.step().axes[0].patches:
        assert isinstance(patch, Rectangle)
        widths[patch.get_y()] = widths.get(patch.get_y(), 0) + patch.get_width()
    assert [width for _, width in sorted(widths.items())] == [4, 6, 4, 3, 3]


def test_the_rooms_of_the_house_are_those_of_the_package():
    for text in pictures.house().axes[0].texts:
        name = text.get_text().split(" ")[0].rstrip(":")
        room = ROOT / "margin_kernels" / name
        assert name in ("imports", "_C") or room.is_dir() or room.with_suffix(".py").is_file(), name


@pytest.mark.parametrize("name", ["one_to_n", "step", "house"])
def test_a_committed_picture_says_what_is_drawn_today(name, tmp_path):
    with pyplot.rc_context(pictures.STYLE):
        pictures.PICTURES[name]().savefig(tmp_path / "new.svg", format="svg")
    new, old = (
        re.findall(r"<text[^>]*>([^<]*)<", path.read_text())
        for path in (tmp_path / "new.svg", pictures.FOLDER / f"{name}.svg")
    )
    assert new == old and len(new) > 5
