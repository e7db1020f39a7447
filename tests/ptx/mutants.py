"""Mistakes made in the text of the PTX, each of which a case must find: by a wrong value or by a fault."""

import math
import re
from dataclasses import dataclass

from .launches import norm_tag
from .parser import Module


@dataclass(frozen=True)
class Mutant:
    """One place of one kernel, changed. `number` counts the matches of `pattern` from 0."""

    what: str
    stem: str
    case: str
    pattern: str
    replacement: str
    number: int = 0
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.stem}, {self.what} {self.number}"

    def applied(self, module: Module) -> Module:
        """The kernels with this mistake."""
        return module.edited(module.find(self.stem, *self.tags), self.edit)

    def edit(self, body: str) -> str:
        """The changed text; no such place is an error, so that no mutant is lost unseen."""
        places = list(re.finditer(self.pattern, body))
        if self.number >= len(places):
            raise ValueError(f"{self}: {self.pattern!r} has {len(places)} places")
        place = places[self.number]
        return body[: place.start()] + place.expand(self.replacement) + body[place.end() :]


Edit = tuple[str, str]  # pattern, replacement
BARRIER: Edit = (r"\bbar\.sync\s+0;", "")
WARP_BARRIER: Edit = (r"\bbar\.warp\.sync\s+-1;", "")
# Of the threads with the numbers 0 to 6 nobody waits.
DIVERGENT: Edit = (
    r"\bbar\.sync\s+0;",
    "mov.u32 %r999999, %tid.x; setp.lt.u32 %p999999, %r999999, 7; @%p999999 bra $Lmutant; bar.sync 0; $Lmutant:",
)
STORE_LOST: Edit = (r"st\.shared(?:\.v2)?\.\w+\s+[^;]*;", "")
STORE_MOVED: Edit = (r"(st\.shared\.\w+\s+\[[^\]+]+)\]", r"\1+8]")
LANE: Edit = (r"(shfl\.sync\.\w+\.b32\s+[^;,]*,[^;,]*), [^;,]*,", r"\1, 3,")
LANES_LEFT_OUT: Edit = (r"(shfl\.sync\.\w+\.b32\s+[^;]*), [^;,]*;", r"\1, 65535;")
INVERTED: Edit = (r"@(%p\d+) bra", r"@!\1 bra")
ONE_MORE: Edit = (r"setp\.lt\.s", r"setp.le.s")
ONE_LESS: Edit = (r"setp\.gt\.s", r"setp.ge.s")
ONE_MORE_LEFT: Edit = (r"setp\.ge\.s", r"setp.gt.s")


def norm_of(p: float) -> tuple[str, ...]:
    """The template argument of a kernel of a norm."""
    return (norm_tag(p),)


# Lanes a row, logits a lane, and more classes than.
FOUR, SIXTEEN = ("Li4ELi64ELi128E",), ("Li16ELi64ELi512E",)
WARP, BLOCK = ("Li32E",), ("Li256E",)  # threads a row


def mutants(what: str, edit: Edit, places: list[tuple]) -> list[Mutant]:
    """One for each (kernel, case, number, template arguments)."""
    return [Mutant(what, stem, case, *edit, number, *tags) for stem, case, number, *tags in places]


MUTANTS = [
    # Every barrier of every kernel; the second of competitors_many_kernel is there for the next 32 competitors.
    *mutants(
        "barrier removed",
        BARRIER,
        [
            ("competitors_part_kernel", "competitors-2100-ties", 0),
            ("competitors_part_kernel", "competitors-2100-ties", 1),
            ("competitors_many_kernel", "competitors-2600-many", 0),
            ("competitors_many_kernel", "competitors-2600-many", 1),
            ("competitors_backward_kernel", "competitors-2100-ties", 0, BLOCK),
            *[("dual_norm_kernel", f"dual_norm-block-{p}", 0, norm_of(p)) for p in (1, 2, 3, math.inf)],
            ("dual_norm_ties_kernel", "dual_norm-parts-1", 0),
            ("dual_norm_backward_kernel", "dual_norm-block-1", 0, norm_of(1)),
            ("dual_norm_backward_kernel", "dual_norm-parts-1", 1, norm_of(1)),
            ("row_distance_kernel", "row_distance-block-2", 0, (*norm_of(2), "Li256E")),
            ("row_distance_ties_kernel", "row_distance-warp-1", 0),
            ("row_distance_backward_kernel", "row_distance-warp-2", 0, norm_of(2)),
            ("one_to_n_columns_kernel", "one_to_n-tiles", 0),
            ("one_to_n_finish_kernel", "one_to_n", 0),
            ("one_to_n_rows_kernel", "one_to_n-long-rows", 0),
            ("one_to_n_samples_kernel", "one_to_n", 0),
            ("one_to_n_totals_kernel", "one_to_n-segments", 0),
            ("deepfool_choose_kernel", "deepfool_step-1", 0),
            ("deepfool_choose_kernel", "deepfool_step-1", 1),
            ("deepfool_first_kernel", "deepfool_step-1", 0),
            ("deepfool_step_kernel", "deepfool_step-1", 0, norm_of(1)),
            ("deepfool_step_kernel", "deepfool_step-2", 0, norm_of(2)),
            ("deepfool_product_kernel", "deepfool_step-2", 0, norm_of(2)),
        ],
    ),
    *mutants(
        "__syncwarp removed",
        WARP_BARRIER,
        [
            ("competitors_row_kernel", "competitors-1001", 0, SIXTEEN),
            ("competitors_row_kernel", "competitors-1001", 1, SIXTEEN),
            ("competitors_part_kernel", "competitors-33000-parts", 0),
            ("competitors_backward_short_kernel", "competitors-10", 0, ("Li4E",)),
            ("competitors_backward_kernel", "competitors-1001", 0, WARP),
        ],
    ),
    *mutants(
        "barrier that few threads skip",
        DIVERGENT,
        [
            ("competitors_part_kernel", "competitors-2100-ties", 1),
            ("one_to_n_samples_kernel", "one_to_n-segments", 0),
        ],
    ),
    *mutants(
        "shared value not written",
        STORE_LOST,
        [
            *[("competitors_part_kernel", "competitors-2100-ties", number) for number in (0, 1, 2, 3, 20)],
            *[("competitors_many_kernel", "competitors-2600-many", number) for number in (0, 1, 2, 3)],
            *[("competitors_row_kernel", "competitors-1001", number, SIXTEEN) for number in (0, 9, 17)],
            ("dual_norm_kernel", "dual_norm-block-2", 1, norm_of(2)),
            ("one_to_n_columns_kernel", "one_to_n-lanes", 9),
            ("one_to_n_finish_kernel", "one_to_n", 0),
            ("one_to_n_rows_kernel", "one_to_n-long-rows", 0),
            ("one_to_n_samples_kernel", "one_to_n-segments", 0),
            ("one_to_n_totals_kernel", "one_to_n-segments", 0),
            ("deepfool_choose_kernel", "deepfool_step-1", 4),
            ("deepfool_step_kernel", "deepfool_step-2", 1, norm_of(2)),
        ],
    ),
    *mutants(
        "shared value beside its place",
        STORE_MOVED,
        [
            ("competitors_part_kernel", "competitors-2100-ties", 2),
            ("row_distance_kernel", "row_distance-block-2", 0, (*norm_of(2), "Li256E")),
            ("one_to_n_samples_kernel", "one_to_n-segments", 1),
            ("deepfool_product_kernel", "deepfool_step-2", 0, norm_of(2)),
        ],
    ),
    *mutants(
        "lane of a shuffle changed",
        LANE,
        [
            *[("competitors_row_kernel", "competitors-1001", number, SIXTEEN) for number in (0, 2, 6, 10)],
            ("competitors_part_kernel", "competitors-2100-ties", 4),
            ("competitors_merge_kernel", "competitors-33000-parts", 6),
            ("competitors_many_kernel", "competitors-2600-many", 2),
            ("competitors_backward_short_kernel", "competitors-30-masked", 0, ("Li8E",)),
            ("competitors_backward_kernel", "competitors-1001", 1, WARP),
            ("dual_norm_kernel", "dual_norm-block-2", 0, norm_of(2)),
            ("dual_norm_finish_kernel", "dual_norm-parts-2", 2, norm_of(2)),
            ("dual_norm_ties_kernel", "dual_norm-parts-1", 5),
            ("one_to_n_columns_kernel", "one_to_n-lanes", 3),
            ("one_to_n_rows_kernel", "one_to_n-long-rows", 0),
        ],
    ),
    *mutants(
        "lanes left out of a shuffle",
        LANES_LEFT_OUT,
        [
            ("competitors_row_kernel", "competitors-1001", 2, SIXTEEN),
            ("dual_norm_finish_kernel", "dual_norm-parts-2", 4, norm_of(2)),
            ("one_to_n_rows_kernel", "one_to_n-long-rows", 1),
        ],
    ),
    *mutants(
        "predicate inverted",
        INVERTED,
        [
            ("competitors_row_kernel", "competitors-10", 43, ("Li1ELi16ELi0E",)),
            ("competitors_row_kernel", "competitors-1001", 101, SIXTEEN),
            *[("competitors_row_kernel", "competitors-150-ties", number, FOUR) for number in (20, 142, 182)],
            ("competitors_part_kernel", "competitors-2100-ties", 51),
            ("competitors_many_kernel", "competitors-2600-many", 24),
            ("competitors_merge_kernel", "competitors-33000-parts", 32),
            ("competitors_backward_kernel", "competitors-2100-ties", 65, BLOCK),
            ("dual_norm_backward_kernel", "dual_norm-parts-1", 35, norm_of(1)),
            ("row_distance_kernel", "row_distance-warp-2", 13, (*norm_of(2), "Li32E")),
            ("row_distance_backward_kernel", "row_distance-segments", 4, norm_of(2)),
            ("row_distance_join_kernel", "row_distance-segments", 1),
            ("margin_hinge_kernel", "margin_hinge-max-options", 193),
            ("margin_hinge_backward_kernel", "margin_hinge-mean_distance-options", 155),
            ("one_to_n_columns_kernel", "one_to_n-lanes", 1),
            ("one_to_n_loss_kernel", "one_to_n-one-class", 0),
            ("one_to_n_samples_kernel", "one_to_n-one-class", 0),
            ("one_to_n_backward_kernel", "one_to_n-tiles", 3),
        ],
    ),
    *mutants(
        "bound off by one",
        ONE_MORE,
        [
            ("competitors_row_kernel", "competitors-10", 14, ("Li1ELi16ELi0E",)),
            ("competitors_row_kernel", "competitors-1001", 69, SIXTEEN),
            ("competitors_backward_short_kernel", "competitors-10", 1, ("Li4E",)),
            ("competitors_backward_kernel", "competitors-1001", 6, WARP),
            *[("row_distance_ties_kernel", "row_distance-warp-1", number) for number in (1, 2, 8)],
            ("margin_hinge_kernel", "margin_hinge-max-options", 39),
            ("one_to_n_columns_kernel", "one_to_n-misaligned", 28),
            ("one_to_n_rows_kernel", "one_to_n-lanes", 0),
        ],
    ),
    *mutants(
        "bound off by one, the other way",
        ONE_LESS,
        [
            ("one_to_n_columns_kernel", "one_to_n-misaligned", 1),
            ("one_to_n_columns_kernel", "one_to_n-lanes", 2),
            ("one_to_n_backward_kernel", "one_to_n-misaligned", 3),
        ],
    ),
    *mutants(
        "one too many left in",
        ONE_MORE_LEFT,
        [
            ("competitors_row_kernel", "competitors-10", 1, ("Li1ELi16ELi0E",)),
            ("competitors_backward_short_kernel", "competitors-10", 0, ("Li4E",)),
            ("competitors_backward_kernel", "competitors-1001", 0, WARP),
        ],
    ),
]
