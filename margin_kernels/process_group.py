"""What losses share between processes: sums, columns and rows of a batch that is divided among them.

    whole(values, count)    size * sum over this process's samples / sum over all of count
    gathered(rows)          [N,*] of each process -> the rows of all, in the order of the processes

The mean over the processes of `whole` is the mean over the whole batch, whatever part of it a process has, none
included. DistributedDataParallel and fully_shard average gradients over the processes, and so give those of the whole
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

from .tracing import tracing

WORLD = "world"
ANOTHER = "another process ended this step with an error, see there"
# Set while a step is rehearsed on one process, which must not wait for others.
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, no process waits for another: each has the whole batch."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rehearsing() -> bool:
    """Whether this is inside `alone`."""
    return _alone.get()


@contextmanager
def named(what: str) -> Iterator[None]:
    """Says in the error of a collective which one it was."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} did not end on all processes: one of them has died, hangs, or takes other steps ({error})"
        ) from error


def several() -> bool:
    """Whether there may be other processes to exchange numbers with."""
    return distributed.is_available() and distributed.is_initialized() and not _alone.get()


class Group:
    """The processes that have parts of one batch; without `given` or torch.distributed this process alone.

    Args:
        given: None, "world" for the default group of torch.distributed, a ProcessGroup, or a DeviceMesh of one
            dimension
    """

    def __init__(self, given: Any = None) -> None:
        self._group: Any = None
        self.size, self.rank = 1, 0
        if given is None or not several():
            return
        self._group = distributed.group.WORLD if isinstance(given, str) else given
        if hasattr(given, "get_group"):
            self._group = given.get_group()
        self.size, self.rank = distributed.get_world_size(self._group), distributed.get_rank(self._group)
        if self.rank < 0:
            raise ValueError("process_group must hold this process")

    @property
    def ranks(self) -> list[int]:
        """The processes, by their numbers among all."""
        return [] if self._group is None else distributed.get_process_group_ranks(self._group)

    def reduce(self, value: Tensor, how: str, what: str) -> Tensor:
        """The "sum" or "min" over the processes, a constant for autograd; no host waits for a device. what: the name
        for the user."""
        if self.size == 1:
            return value
        from torch.distributed import _functional_collectives as collectives  # takes a second

        with named(what):
            return collectives.wait_tensor(collectives.all_reduce(value.detach().contiguous(), how, self._group))

    def counts(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many rows of the batch the processes before this one have, and all of them, [] int64 each."""
        numbers = torch.zeros(self.size, dtype=torch.int64, device=device)
        numbers[self.rank] = rows
        numbers = self.reduce(numbers, "sum", "the count of samples")
        return numbers[: self.rank].sum(), numbers.sum()

    def whole(self, total: Tensor, count: Tensor | float) -> Tensor:
        """size * total [] / sum over the processes of `count`, whose mean over the processes is that of the batch."""
        if self.size == 1:
            return total / count
        wide = count if isinstance(count, Tensor) else torch.full((), float(count), device=total.device)
        return self.size * total / self.reduce(wide.to(total.dtype), "sum", "the count of samples")

    def columns(self, column: Tensor) -> Tensor:
        """[*] of each process -> [size, *]; the gradient is the sum over the processes."""
        found: Tensor = _Columns.apply(column, self)
        return found

    def gathered(self, rows: Tensor, what: str) -> Tensor:
        """The rows [N,*] of all processes, whatever N each has; a constant for autograd. Reads the numbers of rows on
        the host. Raises ValueError in a compiled step."""
        if self.size == 1:
            return rows
        if tracing():
            raise ValueError(f"{what} cannot be compiled with several processes: their parts may have other sizes")
        rows = rows.detach().contiguous()
        with named(what):
            counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.size)]
            distributed.all_gather(counts, torch.full_like(counts[0], len(rows)), group=self._group)
            numbers = [int(count) for count in torch.cat(counts).tolist()]
            padded = rows.new_zeros(max(numbers), *rows.shape[1:])
            padded[: len(rows)] = rows
            parts = [torch.empty_like(padded) for _ in numbers]
            distributed.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])

    def checked(self, check: Callable[[], Any]) -> None:
        """Runs a check. Its error on one process is an error on all: none is left waiting for another."""
        error: Exception | None = None
        try:
            check()
        except Exception as found:
            error = found
        if self.lowest([int(error is None)], "the check of a batch") == [0]:
            raise error or RuntimeError(ANOTHER)

    def lowest(self, codes: list[int], what: str) -> list[int]:
        """The smallest of each number over the processes, on the host."""
        if self.size == 1:
            return codes
        with named(what):
            found = torch.tensor(codes, device=self._host())
            distributed.all_reduce(found, distributed.ReduceOp.MIN, group=self._group)
            return [int(code) for code in found.tolist()]

    def _host(self) -> torch.device:
        """The CPU, where the group has a way between CPUs, and this process's device where it has not."""
        backends = distributed.get_backend_config(self._group)
        return torch.device("cpu" if "cpu:gloo" in str(backends) else torch.accelerator.current_accelerator() or "cpu")


class Agreement:
    """The processes of `groups` take one strategy in a step, and an error of one before that is an error of all."""

    # What they tell each other.
    CODES: ClassVar = {"error": 0, "loop": 1, "split": 2, "tangent": 3}

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self._told = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around what calls `agree`."""
        self._told = False
        try:
            yield
        except Exception:
            if not self._told:
                self._tell("error")
            raise

    def agree(self, strategy: str) -> bool:
        """Whether all processes take this strategy. Raises RuntimeError where one has an error."""
        lowest, least = self._tell(strategy)
        if lowest == self.CODES["error"]:
            raise RuntimeError(ANOTHER)
        return lowest == self.CODES[strategy] == -least

    def _tell(self, strategy: str) -> list[int]:
        self._told = True
        codes = [self.CODES[strategy], -self.CODES[strategy]]
        for group in self.groups:
            codes = group.lowest(codes, "the agreement on the strategy of a step")
        return codes


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, column: Tensor, group: Group) -> Tensor:
        from torch.distributed import _functional_collectives as collectives

        ctx.group = group
        with named("the exchange of the columns"):
            rows = column.detach().unsqueeze(0).contiguous()
            return collectives.wait_tensor(collectives.all_gather_tensor(rows, 0, group._group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce(grad, "sum", "the exchange of the columns' gradients")[ctx.group.rank], None


def check(name: str, value: Any) -> Any:
    """A process_group that exists; True and False, as across_processes had them, are "world" and None. Raises
    TypeError."""
    if isinstance(value, bool):
        return WORLD if value else None
    if value is None or value == WORLD or hasattr(value, "get_group"):
        return value
    if distributed.is_available() and isinstance(value, distributed.ProcessGroup):
        return value
    raise TypeError(
        f'{name} must be None, "world", a ProcessGroup or a DeviceMesh of one dimension, got {type(value).__name__}'
    )
