"""The processes that train one network together, as torchrun starts them. Only this file knows torch.distributed.

    torchrun --nproc-per-node 2 -m margin_kernels.experiments train ...

Every process draws the whole batch of the single process, [n], and takes a contiguous part of it, [n_r], n = sum n_r.
DistributedDataParallel averages gradients over the P processes, so a process weighs the mean loss of its part by
P n_r / n: the average is then the gradient of the mean over the whole batch. An empty part is one sample of weight 0:
every process takes part in every collective. The losses of the library do the same by themselves (`process_group`), for
an empty part too.

Process 0 alone writes; what it does for all goes through `first`, which tells the others how it ended. The process that
fails first says why, and settles the exit status of all. A collective that does not end is an error that names what the
processes were at; on GPUs PyTorch's watchdog ends the process instead, and names the collective.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")
TIMEOUT = 600.0  # seconds that a process waits for the others
MEET = 600.0  # and for their start, for a busy machine starts them one after another
ANSWER = 2.0  # seconds within which a process that has failed says that it lives
WORD = 10.0  # and within which the store gives what processes left in it
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What torch.distributed says where another process is gone: its errors have no type of their own.
LOST = ("gloo", "nccl", "tcpstore", "pair closure", "connection closed", "connection reset", "broken pipe")

# What its text has around the reason: lines of source, gloo's and those of `_one_by_one`.
AROUND = r"\[\S*/gloo/\S*\] |Got the following error when running the callback: RuntimeError: | At: \S+\(\d+\): \w+"


class ProcessesError(RuntimeError):
    """Another process is gone or does not answer; the message says in what, and which."""


class ElsewhereError(Exception):
    """Another process has failed and says why; `status`: the exit status of all."""

    def __init__(self, status: int) -> None:
        super().__init__(f"another process ended with {status}")
        self.status = status


class Processes:
    """`size` processes, this one being number `rank`, with the default group of torch.distributed.

    Args:
        rank: 0 for the process that writes
        size: 1 for a process by itself, for which everything here does nothing
        local_rank: number of the process on its machine, which is that of its GPU
        timeout: seconds that a collective waits
        store: where processes leave word for each other after a failure, or None
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, timeout: float = TIMEOUT, store: Any = None
    ) -> None:
        self.rank, self.size, self.local_rank, self.timeout = rank, size, local_rank, timeout
        self.doing = "the start"  # what all of them are at, in words
        self._store = store

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """The contiguous part of `count` samples that is this process's; the first ones have one more, and process 0
        always one."""
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    def check_device(self, device: torch.device) -> torch.device:
        """The GPU of this process for "cuda", any other device as it is. Raises ValueError where there is none."""
        if not self.several or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(
                "training.device must be cuda or cpu for several processes, each of which takes the GPU of its "
                f"LOCAL_RANK, got {device}"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"training.device must be cpu, or --nproc-per-node at most {torch.cuda.device_count()}, the number of "
                f"GPUs, got cuda for the process of LOCAL_RANK {self.local_rank}"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def seed(self, seed: int) -> None:
        """What each process draws by itself from here on: dropout masks, noise."""
        if self.several:
            torch.manual_seed(seed + self.rank)

    def wrapped(self, task: nn.Module, device: torch.device) -> nn.Module:
        """The task with gradients that are averaged over the processes."""
        if not self.several:
            return task
        gc.collect()  # the one before has hooks on the same parameters, and goes with its cycles
        cuda = device.type == "cuda"
        with self.phase("the exchange of the first weights"):
            found = nn.parallel.DistributedDataParallel(task, device_ids=[device] if cuda else None)
        if not cuda:
            # A lambda: its annotations would have to be types, and are texts in this file.
            found.register_comm_hook(self.size, lambda size, bucket: _one_by_one(size, bucket))
        return found

    def exchanged(self, module: Any, last: bool) -> AbstractContextManager[Any]:
        """For one backward pass of several: the gradients are exchanged in the last one."""
        return module.no_sync() if self.several and not last else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, the same on all."""
        if self.several:
            distributed.all_reduce(values)
        return values

    def gathered(self, value: T) -> list[T]:
        """What each process has, in the order of their numbers."""
        found: list[Any] = [value]
        if self.several:
            found *= self.size
            distributed.all_gather_object(found, value)
        return found

    def share_buffers(self, model: nn.Module) -> None:
        """Buffers (running statistics) as process 0 has them, which are those that are saved."""
        if self.several:
            with self.phase("the exchange of buffers"):
                for buffer in model.buffers():
                    distributed.broadcast(buffer, 0)

    def first(self, what: str, work: Callable[[], T]) -> T:
        """What work() returns on process 0, which alone calls it, told to all. Where it fails, all fail."""
        if not self.several:
            return work()
        told: list[Any] = [None, None]
        failure = None
        if self.writes:
            try:
                told[0] = work()
            except Exception as error:
                failure = error
                told[1] = True
        with self.phase(what):
            distributed.broadcast_object_list(told, 0, device=torch.device("cpu"))
        return self._outcome(told[0], failure, bool(told[1]))

    def together(self, what: str, work: Callable[[], T]) -> T:
        """What work() returns, which every process calls and which exchanges nothing. Where it fails on one, all
        fail."""
        if not self.several:
            return work()
        value: Any = None
        failure = None
        try:
            value = work()
        except Exception as error:
            failure = error
        with self.phase(what):
            failed = any(self.gathered(failure is not None))
        return self._outcome(value, failure, failed)

    def _outcome(self, value: T, failure: Exception | None, failed: bool) -> T:
        if failure is not None:
            raise failure
        if failed:
            raise ElsewhereError(self._told())
        return value

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Names what the processes do together, for the message where one of them does not. Raises ProcessesError."""
        if not self.several:
            yield
            return
        before, self.doing = self.doing, what
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if isinstance(error, ProcessesError) or not any(word in text.lower() for word in LOST):
                raise
            reason = re.sub(AROUND, "", text)
            late = any(word in reason.lower() for word in ("timed out", "timeout"))
            why = f" within {self.timeout:g} s" if late else ", as one of them has ended"
            raise ProcessesError(f"{what} did not end on all {self.size} processes{why}: {reason}") from error
        self.doing = before

    def claim(self, status: int) -> int | None:
        """None where this process is the first that failed, with `status`, and says why; else the status of the first,
        which has."""
        mine = f"{status} {self.rank}"
        found = self._word(lambda store: store.compare_set("failed", "", mine).decode())
        return None if found in (None, mine) else int(found.split()[0])

    def _told(self) -> int:
        """The exit status of the process that failed first, once it has said why; 1 where it has ended without."""
        found = self._word(lambda store: store.get("failed").decode())
        return 1 if found is None else int(found.split()[0])

    def silent(self) -> str:
        """The processes that give no sign of life after a failure, in words; "" where all do, or nobody knows."""

        def missing(store: Any) -> list[str]:
            store.set(f"lives/{self.rank}", "")
            time.sleep(ANSWER)
            return [str(rank) for rank in range(self.size) if not store.check([f"lives/{rank}"])]

        found = self._word(missing)
        return f"no answer from process {', '.join(found)}" if found else ""

    def _word(self, ask: Callable[[Any], T]) -> T | None:
        """What ask(store) finds; None where whoever keeps the store is gone, or hangs, for which a store has no
        time-out."""
        found: list[T] = []

        def work() -> None:
            with suppress(Exception):
                found.append(ask(self._store))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(WORD)
        return found[0] if found else None

    def leave(self) -> None:
        """Ends the group."""
        if self.several and distributed.is_initialized():
            distributed.destroy_process_group()

    def end(self, status: int) -> NoReturn:
        """Ends this process: gloo's threads outlive their group, and must not meet an interpreter that is closing."""
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = status or 1
        os._exit(status)


def _one_by_one(size: int, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over the processes, of each gradient by itself. The order in which three or more numbers are added
    depends on their place in what is reduced, and DistributedDataParallel moves the gradients there after its first
    step: a resumed run would differ in the last bit."""
    whole = bucket.buffer().div_(size)
    each = [distributed.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]

    def ended(futures: torch.futures.Future[list[torch.futures.Future[Any]]]) -> Tensor:
        for future in futures.value():
            future.wait()
        return whole

    return torch.futures.collect_all(each).then(ended)


ALONE = Processes()


def join(timeout: float = TIMEOUT) -> Processes:
    """The processes that the environment names, once all of them are here; ALONE where WORLD_SIZE is 1 or missing.

    Raises ValueError for an environment that is not whole, ProcessesError where they do not meet within MEET seconds;
    `timeout`: of what they do together from then on.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return ALONE
    missing = [name for name in ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} must be set too, as torchrun does: "
            "start by torchrun, or unset WORLD_SIZE"
        )
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in ENVIRONMENT[:3])
    except ValueError:
        values = ", ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT[:3])
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers, got {values}") from None
    if not (0 <= rank < size and local_rank >= 0):
        raise ValueError(f"RANK must be from 0 to WORLD_SIZE - 1 = {size - 1} and LOCAL_RANK at least 0, got {rank}")
    if not distributed.is_available():
        raise ValueError(f"WORLD_SIZE must be 1, got {size}: this torch {torch.__version__} has no torch.distributed")
    # Where a convolution has one channel its weights have two names for one layout.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if rank:  # process 0 says the same
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        warnings.simplefilter("ignore")
    from torch.distributed.rendezvous import rendezvous

    meet = timedelta(seconds=MEET)
    try:
        store, _, _ = next(rendezvous("env://", timeout=meet))
        store.set(f"here/{rank}", "")
        store.wait([f"here/{one}" for one in range(size)], meet)
        distributed.init_process_group(
            # One group for both: what is on the CPU goes through gloo.
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo",
            store=distributed.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ProcessesError(
            f"the {size} processes (WORLD_SIZE) of this command did not meet at {where} within {MEET:g} s: "
            f"{' '.join(str(error).split())}"
        ) from error
    return Processes(rank, size, local_rank, timeout, distributed.PrefixStore("margin_kernels", store))
