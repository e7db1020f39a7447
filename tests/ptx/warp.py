"""A warp: 32 lanes with registers, in groups that stand at the same instruction.

Lanes that a branch parts become two groups; groups that meet at an instruction become one. A group waits at a
barrier, and at a shuffle until all lanes that it names are there.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .instructions import Kind, Step
from .memory import Access, Fault, moments
from .operands import ALL, LANE, LANES, Lanes

if TYPE_CHECKING:
    from .grid import Block

MOST_STEPS = 500_000  # of one warp; the longest case takes a tenth of it


@dataclass(eq=False)
class Group:
    """Lanes at one instruction. `waits_for` is "barrier", "lanes" or nothing."""

    at: int
    mask: np.ndarray
    waits_for: str = ""

    @property
    def lanes(self) -> Lanes:
        """The mask as steps take it."""
        return None if self.mask is ALL else self.mask


def whole(mask: np.ndarray) -> np.ndarray:
    """ALL itself where every lane is in the mask."""
    return ALL if mask.all() else mask


class Warp:
    """Runs its lanes step by step. `number` is its place in the block."""

    def __init__(self, block: "Block", number: int):
        self.block: Block = block
        self.number = number
        self.threads: np.ndarray = np.arange(LANES, dtype=np.uint32) + np.uint32(LANES * number)
        self.registers = block.program.zeros.copy()
        self.unwritten = dict.fromkeys(range(len(self.registers)), ALL)  # register -> lanes that have not written it
        self.spoiled: np.ndarray | None = None  # lanes in which the step under way has read an unwritten register
        self.barriers, self.taken = 0, 0
        present = self.threads < block.size
        self.exited = ~present
        self.groups = [Group(0, whole(present))]

    def ready(self) -> list[Group]:
        """The groups that wait for nothing."""
        return [group for group in self.groups if not group.waits_for]

    def run(self, chance: random.Random | None) -> None:
        """A group runs until it waits or ends: the one that is furthest behind, or by chance any for some steps."""
        ready = self.ready()
        if chance is None:
            self._run(min(ready, key=lambda group: group.at), 1 << 40, keep_behind=True)
        else:
            self._run(chance.choice(ready), chance.randint(1, 40), keep_behind=False)

    def _run(self, group: Group, steps: int, keep_behind: bool) -> None:
        program, executed = self.block.program.steps, self.block.counts.executed
        for _ in range(steps):
            step = program[group.at]
            if step.kind is Kind.BARRIER:
                group.waits_for = "barrier"
                return
            if step.kind is Kind.TOGETHER and not self._all_here(step, group):
                group.waits_for = "lanes"
                return
            executed[group.at] += 1
            self.taken += 1
            self.spoiled = None
            if self.taken > MOST_STEPS:
                raise Fault(f"no end after {MOST_STEPS} steps\n  {step.instruction}\n  {self}")
            try:
                going_on = self._take(step, group)
            except Fault as fault:
                raise Fault(f"{fault}\n  {step.instruction}\n  {self}") from None
            if not going_on:
                return
            if len(self.groups) > 1:
                group = self._merge(group)
                if keep_behind and any(other.at < group.at and not other.waits_for for other in self.groups):
                    return

    def __str__(self) -> str:
        return f"warp {self.number} of block {self.block.index} of {self.block.program.kernel.name}"

    def _take(self, step: Step, group: Group) -> bool:
        """One step; is the group still there?"""
        if step.kind in (Kind.PLAIN, Kind.TOGETHER):
            lanes = group.lanes
            if step.guard is not None:
                held = whole(group.mask & step.guard(self, lanes))
                lanes = None if held is ALL else held
            if lanes is None or lanes.any():
                step.run(self, lanes)
            group.at += 1
            return True
        held = group.mask if step.guard is None else group.mask & step.guard(self, group.lanes)
        rest = group.mask & ~held
        if step.kind is Kind.EXIT:
            self.exited |= held
            group.mask, group.at = whole(rest), group.at + 1
            if not rest.any():
                self.groups.remove(group)
            return bool(rest.any())
        if not rest.any():
            group.at = step.label
        elif not held.any():
            group.at += 1
        else:
            self.groups.append(Group(step.label, held))
            group.mask, group.at = rest, group.at + 1
        return True

    def _merge(self, group: Group) -> Group:
        """A group that has come to where others stand takes their lanes."""
        for other in [other for other in self.groups if other is not group and other.at == group.at]:
            self.groups.remove(other)
            group.mask = whole(group.mask | other.mask)
        return group

    def _all_here(self, step: Step, group: Group) -> bool:
        """Are all lanes at a step that it names?"""
        self.spoiled = None
        masks = step.members(self, group.lanes)[group.mask]
        named = (int(masks[0]) >> LANE & 1).astype(bool)
        if (masks != masks[0]).any() or (group.mask & ~named).any():
            raise Fault(f"lanes at a shuffle that its mask leaves out\n  {step.instruction}\n  {self}")
        if (named & self.exited).any():
            lane = int(np.flatnonzero(named & self.exited)[0])
            raise Fault(f"a shuffle waits for lane {lane}, which has ended\n  {step.instruction}\n  {self}")
        return not (named & ~group.mask).any()

    # What steps ask for ----------------------------------------------------------------------------------------

    def spoil(self, lanes: np.ndarray) -> None:
        """The step reads a register that these lanes have not written."""
        self.spoiled = lanes if self.spoiled is None else self.spoiled | lanes

    def access(self, addresses: np.ndarray, lanes: Lanes, width: int, stores: bool) -> Access:
        """A load or store at this moment."""
        present = LANE if lanes is None else LANE[lanes]
        now = moments(self.block.number, self.number, present, self.block.barriers, self.barriers)
        return Access(addresses if lanes is None else addresses[lanes], width, now, stores)

    def load(self, space: str, addresses: np.ndarray, lanes: Lanes, width: int) -> np.ndarray:
        """[lanes, width] bytes."""
        if space == "param":
            places = (addresses if lanes is None else addresses[lanes])[:, None] + np.arange(width)
            if places.min() < 0 or places.max() >= len(self.block.parameters):
                raise Fault(f"load of {width} bytes out of the bounds of the parameters")
            return self.block.parameters[places]
        return self.block.memory(space).load(self.access(addresses, lanes, width, stores=False))

    def store(self, space: str, addresses: np.ndarray, lanes: Lanes, content: np.ndarray) -> None:
        """content: [lanes, width] bytes."""
        self.block.memory(space).store(self.access(addresses, lanes, content.shape[1], stores=True), content)
