"""An instruction -> a step: a function on a warp and the lanes that stand at it."""

import re
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .arithmetic import UNSIGNED, operation, type_of
from .memory import Fault
from .operands import ALL, LANE, LANES, NONE, Lanes, Source, Target, certain, listed, source, target
from .parser import Instruction, Kernel, UnknownPtx

if TYPE_CHECKING:
    from .warp import Warp


class Kind(Enum):
    """What a step does to the course of its lanes."""

    PLAIN = "goes on behind it"
    BRANCH = "goes to its label where its guard holds"
    EXIT = "ends where its guard holds"
    BARRIER = "waits for all threads of the block"
    TOGETHER = "waits for the lanes that it names, then goes on"


class Step(NamedTuple):
    """An instruction, decoded."""

    kind: Kind
    instruction: Instruction
    run: Callable[["Warp", Lanes], None] | None = None  # of PLAIN and TOGETHER
    guard: Source | None = None
    label: int = -1  # of BRANCH
    members: Source | None = None  # of TOGETHER: the mask of the lanes that take part
    counted_as: str = ""


class Program:
    """A kernel whose steps are decoded, with a number for each register."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.slots: dict[str, int] = {}
        self.steps = [decode(self, instruction) for instruction in kernel.code]
        self.zeros = [np.zeros(LANES, kernel.register_type(name)) for name in self.slots]

    def slot(self, register: str) -> int:
        """The number of a register."""
        return self.slots.setdefault(register, len(self.slots))


# ---------------------------------------------------------------------------------------------------------- steps


def decode(program: Program, instruction: Instruction) -> Step:
    """The step of an instruction; one that is not known raises UnknownPtx."""
    opcode, operands = instruction.opcode, instruction.operands
    guard = None
    if instruction.guard:
        guard = source(program, ("!" if instruction.negated else "") + instruction.guard, np.bool_)
        guard = certain(guard, "whether an instruction is executed")
    counted_as = class_of(opcode)
    if opcode[0] == "bra":
        return Step(
            Kind.BRANCH, instruction, guard=guard, label=program.kernel.labels[operands[-1]], counted_as=counted_as
        )
    if opcode in (("ret",), ("exit",)):
        return Step(Kind.EXIT, instruction, guard=guard, counted_as=counted_as)
    if opcode in (("bar", "sync"), ("barrier", "sync")) and operands == ("0",) and guard is None:
        return Step(Kind.BARRIER, instruction, counted_as=counted_as)
    try:
        if opcode[:2] in (("shfl", "sync"), ("vote", "sync"), ("redux", "sync"), ("bar", "warp")) and guard is None:
            members = certain(source(program, operands[-1], np.uint32), "the mask of a shuffle")
            run = {"shfl": shuffle, "vote": vote, "redux": reduction, "bar": warp_barrier}[opcode[0]](
                program, instruction
            )
            return Step(Kind.TOGETHER, instruction, run, members=members, counted_as=counted_as)
        builders = {"ld": load, "st": store, "mov": move, "cvta": address_as_it_is}
        run = builders.get(opcode[0], elementwise)(program, instruction)
    except (UnknownPtx, KeyError, ValueError, IndexError) as error:
        raise UnknownPtx(f"{program.kernel.name}: cannot execute {instruction}: {error}") from error
    return Step(Kind.PLAIN, instruction, run, guard=guard, counted_as=counted_as)


Run = Callable[["Warp", Lanes], None]


SELECTED = ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64")
# What is spoiled where an operand may be without effect: from values and spoiled lanes of the operands.
CHOOSING: dict[tuple[str, ...], Callable[[list[np.ndarray], list[np.ndarray]], np.ndarray]] = {
    ("and", "pred"): lambda v, s: (s[0] & s[1]) | (s[0] & v[1]) | (s[1] & v[0]),
    ("or", "pred"): lambda v, s: (s[0] & s[1]) | (s[0] & ~v[1]) | (s[1] & ~v[0]),
} | {("selp", kind): lambda v, s: s[2] | np.where(v[2], s[0], s[1]) for kind in SELECTED}


def choice(
    write: Target,
    function: Callable[..., np.ndarray],
    reads: list[Source],
    spoiled: Callable[[list[np.ndarray], list[np.ndarray]], np.ndarray],
) -> Run:
    """A step whose operands do not all count in every lane."""

    def run(warp: "Warp", lanes: Lanes) -> None:
        values, masks = [], []
        for read in reads:
            warp.spoiled = None
            values.append(read(warp, lanes))
            masks.append(warp.spoiled)
        warp.spoiled = None
        if any(mask is not None for mask in masks):
            warp.spoiled = spoiled(values, [NONE if mask is None else mask for mask in masks])
        write(warp, function(*values), lanes)

    return run


def elementwise(program: Program, instruction: Instruction) -> Run:
    """One result for each lane from its own operands."""
    function, takes, divides = operation(instruction.opcode)
    to, *operands = instruction.operands
    write = target(program, to)
    reads = [source(program, operand, dtype) for operand, dtype in zip(operands, takes, strict=True)]
    if instruction.opcode in CHOOSING:
        return choice(write, function, reads, CHOOSING[instruction.opcode])
    if len(reads) == 1:
        first = reads[0]
        return lambda warp, lanes: write(warp, function(first(warp, lanes)), lanes)
    first, second, *rest = reads
    if rest:
        third = rest[0]
        return lambda warp, lanes: write(
            warp, function(first(warp, lanes), second(warp, lanes), third(warp, lanes)), lanes
        )
    if not divides:
        return lambda warp, lanes: write(warp, function(first(warp, lanes), second(warp, lanes)), lanes)

    def divide(warp: "Warp", lanes: Lanes) -> None:
        divisor = second(warp, lanes)
        here = (ALL if lanes is None else lanes) & ~(NONE if warp.spoiled is None else warp.spoiled)
        if ((divisor == 0) & here).any():
            raise Fault("division of an integer by zero")
        write(warp, function(first(warp, lanes), divisor), lanes)

    return divide


def move(program: Program, instruction: Instruction) -> Run:
    """mov, also from and to the parts of a register."""
    to, given = instruction.operands
    kind = instruction.opcode[1]
    dtype = type_of(kind)
    if to.startswith("{"):
        writes = [target(program, name) for name in listed(to)]
        read, part = source(program, given, dtype), UNSIGNED[int(kind[1:]) // len(writes)]

        def unpack(warp: "Warp", lanes: Lanes) -> None:
            parts = read(warp, lanes).view(part).reshape(LANES, len(writes))
            for i, write in enumerate(writes):
                write(warp, parts[:, i].copy(), lanes)

        return unpack
    write = target(program, to)
    if given.startswith("{"):
        part = UNSIGNED[int(kind[1:]) // len(listed(given))]
        reads = [source(program, name, part) for name in listed(given)]

        def pack(warp: "Warp", lanes: Lanes) -> None:
            write(warp, np.stack([read(warp, lanes) for read in reads], axis=1).view(dtype)[:, 0], lanes)

        return pack
    read = source(program, given, dtype)
    return lambda warp, lanes: write(warp, read(warp, lanes), lanes)


def address_as_it_is(program: Program, instruction: Instruction) -> Run:
    """cvta.to.global: generic addresses are those of global memory here, and no kernel makes others."""
    if instruction.opcode not in (("cvta", "to", "global", "u64"), ("cvta", "global", "u64")):
        raise UnknownPtx("no rule")
    write, read = target(program, instruction.operands[0]), source(program, instruction.operands[1], np.uint64)
    return lambda warp, lanes: write(warp, read(warp, lanes), lanes)


def shuffle(program: Program, instruction: Instruction) -> Run:
    """shfl.sync: a lane may read from lanes that take part alone."""
    mode = instruction.opcode[2]
    to, _, inside = instruction.operands[0].partition("|")
    write = target(program, to)
    write_inside = target(program, inside or "_")
    value, by, clamp, _ = (source(program, name, np.uint32) for name in instruction.operands[1:])
    by = certain(by, "the lane that a shuffle reads")
    place = {
        "up": lambda by, low: LANE - by,
        "down": lambda by, low: LANE + by,
        "bfly": lambda by, low: LANE ^ by,
        "idx": lambda by, low: by,
    }[mode]

    def run(warp: "Warp", lanes: Lanes) -> None:
        c = clamp(warp, lanes).astype(np.int64)
        segment = c >> 8 & 31
        least, most = LANE & segment, (LANE & segment) | (c & 31 & ~segment)
        offset = by(warp, lanes).astype(np.int64) & 31
        wanted = least | (offset & ~segment) if mode == "idx" else place(offset, least)
        within = wanted >= most if mode == "up" else wanted <= most
        wanted = np.where(within, wanted, LANE)
        present = ALL if lanes is None else lanes
        missing = present & ~present[wanted]
        if missing.any():
            lane = int(np.flatnonzero(missing)[0])
            raise Fault(f"lane {lane} reads lane {int(wanted[lane])} by a shuffle, which does not take part")
        write_inside(warp, within, lanes)
        shown = value(warp, lanes)[wanted]
        if warp.spoiled is not None:
            warp.spoiled = warp.spoiled[wanted]
        write(warp, shown, lanes)

    return run


def vote(program: Program, instruction: Instruction) -> Run:
    """vote.sync.ballot and .any"""
    write = target(program, instruction.operands[0])
    asked = certain(source(program, instruction.operands[1], np.bool_), "a vote")
    mode = instruction.opcode[2]
    bit = np.uint32(1) << LANE.astype(np.uint32)
    if mode not in ("ballot", "any"):
        raise UnknownPtx("no rule")

    def run(warp: "Warp", lanes: Lanes) -> None:
        yes = asked(warp, lanes) & (ALL if lanes is None else lanes)
        write(warp, np.full(LANES, bit[yes].sum(dtype=np.uint32) if mode == "ballot" else yes.any()), lanes)

    return run


def reduction(program: Program, instruction: Instruction) -> Run:
    """redux.sync of 32-bit integers: the largest or smallest of the lanes that take part."""
    mode, kind = instruction.opcode[2:]
    if mode not in ("max", "min") or kind not in ("s32", "u32"):
        raise UnknownPtx("no rule")
    write = target(program, instruction.operands[0])
    read = certain(source(program, instruction.operands[1], type_of(kind)), "a reduction")

    def run(warp: "Warp", lanes: Lanes) -> None:
        values = read(warp, lanes)[ALL if lanes is None else lanes]
        write(warp, np.full(LANES, values.max() if mode == "max" else values.min()), lanes)

    return run


def warp_barrier(program: Program, instruction: Instruction) -> Run:
    """bar.warp.sync orders what the lanes of the warp do before and after it."""

    def run(warp: "Warp", lanes: Lanes) -> None:
        warp.barriers += 1

    return run


# --------------------------------------------------------------------------------------------------------- memory


class Place(NamedTuple):
    """[%rd1+4], [variable+4] or [parameter+4]"""

    read: Source
    offset: int


def place_of(program: Program, operand: str, space: str) -> Place:
    """Where a load or store goes: the addresses and what is added to them."""
    match = re.fullmatch(r"\[([\w$%.]+)(?:\+(-?\d+))?\]", operand)
    base = match[1]
    if base.startswith("%") and space == "shared" and np.dtype(program.kernel.register_type(base)).itemsize == 4:
        narrow = source(program, base, np.uint32)
        wide = certain(lambda warp, lanes: narrow(warp, lanes).astype(np.int64), "an address")
        return Place(wide, int(match[2] or 0))
    return Place(certain(source(program, base, np.int64), "an address"), int(match[2] or 0))


def vector(opcode: tuple[str, ...]) -> tuple[str, type, set[str]]:
    """("ld", "global", "nc", "v4", "u32") -> space, type, and the modifiers that change no value."""
    _, space, *modifiers, kind = opcode
    rest = {m for m in modifiers if not re.fullmatch(r"v[24]", m)}
    return space, type_of(kind), rest


def load(program: Program, instruction: Instruction) -> Run:
    """ld from global and shared memory and from the parameters."""
    space, dtype, rest = vector(instruction.opcode)
    if not rest <= {"nc", "volatile"} or space not in ("global", "shared", "param"):
        raise UnknownPtx("no rule")
    writes = [target(program, name) for name in listed(instruction.operands[0])]
    read, offset = place_of(program, instruction.operands[1], space)
    size = np.dtype(dtype).itemsize
    width = size * len(writes)

    def run(warp: "Warp", lanes: Lanes) -> None:
        addresses = read(warp, lanes) + offset
        content = np.zeros((LANES, width), np.uint8)
        content[slice(None) if lanes is None else lanes] = warp.load(space, addresses, lanes, width)
        for i, write in enumerate(writes):
            write(warp, content[:, i * size : (i + 1) * size].copy().view(dtype)[:, 0], lanes)

    return run


def store(program: Program, instruction: Instruction) -> Run:
    """st to global and shared memory."""
    space, dtype, rest = vector(instruction.opcode)
    if not rest <= {"cs", "wb"} or space not in ("global", "shared"):
        raise UnknownPtx("no rule")
    reads = [certain(source(program, name, dtype), "what is stored") for name in listed(instruction.operands[1])]
    read, offset = place_of(program, instruction.operands[0], space)

    def run(warp: "Warp", lanes: Lanes) -> None:
        content = np.stack([value(warp, lanes) for value in reads], axis=1).view(np.uint8)
        warp.store(space, read(warp, lanes) + offset, lanes, content if lanes is None else content[lanes])

    return run


CLASSES = {
    "control": "bra ret exit bar",
    "shuffle": "shfl vote redux",
    "move": "mov cvta",
    "compare": "setp set selp",
    "convert": "cvt",
    "special": "div rem sqrt rcp ex2 lg2",
}


def class_of(opcode: tuple[str, ...]) -> str:
    """What it is counted as: a key of CLASSES, "ld.global" and the like, a type of floats or "integer"."""
    for name, opcodes in CLASSES.items():
        if opcode[0] in opcodes.split():
            return name
    if opcode[0] in ("ld", "st"):
        return ".".join(opcode[:2])
    return {"f32": "float32", "f64": "float64", "f16x2": "halves", "bf16x2": "halves"}.get(opcode[-1], "integer")
