"""Launches: a grid of blocks, each of warps that meet at barriers."""

import collections
import random
from dataclasses import dataclass, field

import numpy as np

from .instructions import Program
from .memory import Fault, Memory, Traffic
from .operands import LANES
from .warp import Warp


@dataclass
class Counts:
    """What launches of one program did: how often a warp took each step, and what moved from and to global memory."""

    program: Program
    executed: list[int]
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def warp_instructions(self) -> int:
        """Instructions that a warp issued."""
        return sum(self.executed)

    def by_class(self) -> dict[str, int]:
        """Warp instructions by what they are counted as."""
        total: collections.Counter = collections.Counter()
        for step, times in zip(self.program.steps, self.executed, strict=True):
            total[step.counted_as] += times
        return {name: times for name, times in sorted(total.items()) if times}


class Block:
    """A block of `size` threads with its own shared memory."""

    def __init__(self, launch: "Launch", index: tuple[int, int]):
        self.program, self.counts = launch.program, launch.counts
        self.size: int = launch.block
        self.index: tuple[int, int] = index
        self.number = index[1] * launch.grid[0] + index[0]
        self.parameters, self.global_memory = launch.parameters, launch.memory
        self.shared_memory = Memory("shared", 256 + launch.program.kernel.shared_bytes + 256, base=-256)
        self.shared_memory.allocate(launch.program.kernel.shared_bytes)
        self.barriers = 0
        self.warps = [Warp(self, number) for number in range(-(-self.size // LANES))]

    def memory(self, space: str) -> Memory:
        """That of a space."""
        return self.shared_memory if space == "shared" else self.global_memory

    def run(self, chance: random.Random | None) -> None:
        """Warp by warp to the next barrier, in their order or at random, until all have ended."""
        while True:
            ready = [warp for warp in self.warps if warp.ready()]
            if ready:
                (ready[0] if chance is None else chance.choice(ready)).run(chance)
            elif any(warp.groups for warp in self.warps):
                self._pass_barrier()
            else:
                return

    def _pass_barrier(self) -> None:
        groups = [(warp, group) for warp in self.warps for group in warp.groups]
        for warp, group in groups:
            if group.waits_for == "lanes":
                raise Fault(f"a shuffle waits for lanes that do not come\n  {self._step(group.at)}\n  {warp}")
        if len({group.at for _, group in groups}) > 1:
            places = "\n  ".join(str(self._step(at)) for at in sorted({group.at for _, group in groups}))
            raise Fault(f"threads of a block wait at different barriers\n  {places}\n  block {self.index}")
        if sum(int(group.mask.sum()) for _, group in groups) < self.size:
            raise Fault(
                f"a barrier waits for threads that have ended\n  {self._step(groups[0][1].at)}\n  {groups[0][0]}"
            )
        self.barriers += 1
        for _, group in groups:
            self.counts.executed[group.at] += 1
            group.waits_for, group.at = "", group.at + 1

    def _step(self, at: int) -> str:
        return str(self.program.steps[at].instruction)


@dataclass
class Launch:
    """One launch: `grid` blocks (x, y) of `block` threads; `parameters` are the bytes of the kernel's arguments."""

    program: Program
    memory: Memory
    grid: tuple[int, int]
    block: int
    parameters: np.ndarray
    counts: Counts

    def run(self, chance: random.Random | None) -> None:
        """Every block; at random, blocks in any order."""
        self.memory.forget_threads()
        self.memory.traffic = self.counts.traffic
        indices = [(x, y) for y in range(self.grid[1]) for x in range(self.grid[0])]
        if chance is not None:
            chance.shuffle(indices)
        with np.errstate(all="ignore"):
            for index in indices:
                Block(self, index).run(chance)


def packed(program: Program, arguments: list[bytes]) -> np.ndarray:
    """The arguments at their places, each of the size that the kernel declares."""
    declared = program.kernel.parameters
    sizes = [size for _, size in declared.values()]
    if [len(argument) for argument in arguments] != sizes:
        raise ValueError(f"{program.kernel.name} takes arguments of {sizes} bytes, got {[len(a) for a in arguments]}")
    parameters = np.zeros(max((offset + size for offset, size in declared.values()), default=0), np.uint8)
    for (offset, size), argument in zip(declared.values(), arguments, strict=True):
        parameters[offset : offset + size] = np.frombuffer(argument, np.uint8)
    return parameters
