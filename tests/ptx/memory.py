"""Bytes of the device with a shadow: which are allocated, which are written, and who read and wrote each last.

Two accesses of one byte by different threads race unless both read or something orders them: another launch, or
within a block a barrier, or within a warp __syncwarp(). A thread's moment is one number:

    block (23 bits) | warp of the block (5) | lane (5) | barriers so far (15) | __syncwarp()s so far (15)
"""

import collections
from dataclasses import dataclass, field

import numpy as np

FREE, POISONED, WRITTEN = range(3)
NOBODY = -1
ONE, OF_A_WARP, OF_A_BLOCK, OF_A_GRID = range(4)  # how widely the last readers of a byte are spread
SECTOR = 32  # bytes


class Fault(Exception):
    """What a kernel must not do, with the instruction and its line of source."""


def moments(block: int, warp: int, lanes: np.ndarray, barriers: int, warp_barriers: int) -> np.ndarray:
    """The moment of each lane."""
    shared = ((block << 5 | warp) << 5) << 30 | (barriers & 0x7FFF) << 15 | (warp_barriers & 0x7FFF)
    return shared + (lanes << 30)


def unordered(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Where nothing orders an access at the moment `before` and one of another thread `now`."""
    differs = before ^ now
    by_barrier = (differs >> 40 == 0) & (differs >> 15 & 0x7FFF != 0)
    by_warp = (differs >> 35 == 0) & (differs & 0x7FFF != 0)
    return (before != NOBODY) & (differs >> 30 != 0) & ~by_barrier & ~by_warp


def spread(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """ONE to OF_A_GRID: what two threads have in common."""
    differs = before ^ now
    return np.where(differs >> 40 != 0, OF_A_GRID, np.where(differs >> 35 != 0, OF_A_BLOCK, (differs >> 30 != 0) * 1))


@dataclass
class Traffic:
    """What moved, by ("ld" or "st", bytes that one lane moves)."""

    sectors: collections.Counter = field(default_factory=collections.Counter)
    bytes: collections.Counter = field(default_factory=collections.Counter)


@dataclass(frozen=True)
class Access:
    """One load or store of a warp: `width` bytes at an address for each of some lanes, at a moment each."""

    addresses: np.ndarray  # [n]
    width: int
    moments: np.ndarray  # [n]
    stores: bool


class Memory:
    """An address space. Addresses begin at `base`; arrays have gaps between them that no access may touch."""

    def __init__(self, name: str, size: int, base: int, traffic: Traffic | None = None):
        self.name, self.base, self.traffic = name, base, traffic
        self.top = 256
        self.content = np.zeros(size, np.uint8)
        self.state = np.full(size, FREE, np.uint8)
        self.writer, self.reader = np.full(size, NOBODY), np.full(size, NOBODY)
        self.readers = np.full(size, ONE, np.uint8)

    def forget_threads(self) -> None:
        """A launch begins: everything before it is over."""
        self.writer[: self.top], self.reader[: self.top], self.readers[: self.top] = NOBODY, NOBODY, ONE

    def allocate(self, size: int, shift: int = 0) -> int:
        """The address of `size` bytes that hold nothing yet, `shift` bytes behind a multiple of 256."""
        at = -(-self.top // 256) * 256 + shift
        self.top = at + size + 128
        if self.top > len(self.content):
            raise MemoryError(f"{self.name} memory of {len(self.content)} bytes is full")
        self.state[at : at + size] = POISONED
        return self.base + at

    def write(self, address: int, content: bytes) -> None:
        """By the host."""
        at = address - self.base
        self.content[at : at + len(content)] = np.frombuffer(content, np.uint8)
        self.state[at : at + len(content)] = WRITTEN

    def read(self, address: int, size: int) -> bytes:
        """By the host: everything must have been written."""
        at = address - self.base
        missing = np.flatnonzero(self.state[at : at + size] != WRITTEN)
        if len(missing):
            raise Fault(
                f"{len(missing)} of {size} bytes of an output were not written, the first is number {missing[0]}"
            )
        return self.content[at : at + size].tobytes()

    def load(self, access: Access) -> np.ndarray:
        """[n, width] bytes."""
        where = self._checked(access)
        self._record_read(where, np.repeat(access.moments, access.width))
        return self.content[where].reshape(len(access.addresses), access.width)

    def store(self, access: Access, content: np.ndarray) -> None:
        """content: [n, width] bytes."""
        where = self._checked(access)
        self._record_write(where, np.repeat(access.moments, access.width))
        self.content[where] = content.reshape(-1)
        self.state[where] = WRITTEN

    def _checked(self, access: Access) -> slice | np.ndarray:
        """The places of all bytes, lane by lane: a slice where the lanes are neighbours in memory, which is fast."""
        addresses, width = access.addresses, access.width
        kind = f"{'store' if access.stores else 'load'} of {width} bytes in {self.name} memory"
        if (addresses % width != 0).any():
            raise Fault(f"misaligned {kind}: address {addresses[addresses % width != 0][0]:#x}")
        places = addresses - self.base
        if places.min() < 0 or places.max() + width > len(self.content):
            raise Fault(f"{kind} out of bounds: far from every array")
        first, where = int(places[0]), None
        if (np.diff(places) == width).all():
            where = slice(first, first + width * len(places))
        else:
            where = (places[:, None] + np.arange(width)).reshape(-1)
        state = self.state[where]
        least = POISONED if access.stores else WRITTEN
        if state.min() < least:
            lane = int(np.flatnonzero(state < least)[0]) // width
            what = "out of bounds" if (state == FREE).any() else "of what nobody wrote"
            raise Fault(f"{kind} {what}, by lane {access.moments[lane] >> 30 & 31} of the warp")
        if self.traffic is not None:
            key = ("st" if access.stores else "ld", width)
            self.traffic.sectors[key] += len(np.unique(places // SECTOR))  # width <= SECTOR, and aligned
            self.traffic.bytes[key] += width * len(places)
        return where

    def _record_read(self, where: slice | np.ndarray, now: np.ndarray) -> None:
        if (unordered(self.writer[where], now)).any():
            raise Fault(f"race in {self.name} memory: read of what another thread writes, with no barrier between")
        before = self.reader[where]
        if (before != NOBODY).any():
            together = unordered(before, now)
            wide = np.maximum(self.readers[where], spread(before, now))
            self.readers[where] = np.where(
                together, wide, np.where(before >> 30 == now >> 30, self.readers[where], ONE)
            )
        if not isinstance(where, slice):
            # Several lanes of one instruction at one byte.
            _, inverse, count = np.unique(where, return_inverse=True, return_counts=True)
            several = count[inverse] > 1
            self.readers[where] = np.where(several, np.maximum(self.readers[where], OF_A_WARP), self.readers[where])
        self.reader[where] = now

    def _record_write(self, where: slice | np.ndarray, now: np.ndarray) -> None:
        if not isinstance(where, slice) and len(np.unique(where)) < len(where):
            raise Fault(f"race in {self.name} memory: lanes of one store write the same byte")
        if unordered(self.writer[where], now).any():
            raise Fault(f"race in {self.name} memory: two threads write, with no barrier between")
        before, readers = self.reader[where], self.readers[where]
        if (before != NOBODY).any():
            # Where many threads have read, being the last one of them orders nothing: only a barrier of all does.
            differs = before ^ now
            by_barrier = (differs >> 40 == 0) & (differs >> 15 & 0x7FFF != 0) & (readers <= OF_A_BLOCK)
            by_warp = (differs >> 35 == 0) & (differs & 0x7FFF != 0) & (readers <= OF_A_WARP)
            alone = (differs >> 30 == 0) & (readers == ONE)
            if ((before != NOBODY) & ~by_barrier & ~by_warp & ~alone).any():
                raise Fault(f"race in {self.name} memory: write of what another thread reads, with no barrier between")
        self.writer[where] = now
