"""The text of a PTX file -> its kernels. A function that is called is inlined, its registers and labels renamed."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

REGISTER_TYPES = {
    "pred": np.bool_,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
}


class UnknownPtx(Exception):
    """Text or an instruction that this tool does not know."""


@dataclass(frozen=True)
class Instruction:
    """`@!%p3 add.f32 %f1, %f2, %f3;` with the line of source that it comes from."""

    opcode: tuple[str, ...]  # ("add", "f32")
    operands: tuple[str, ...]  # ("%f1", "%f2", "%f3"); "{%r1, %r2}" and "[%rd1+4]" are one operand
    guard: str | None  # "%p3"
    negated: bool
    place: str  # "dual_norm.cuh:120"

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.opcode)} {', '.join(self.operands)}  [{self.place}]"


@dataclass(eq=False)
class Kernel:
    """One `.entry`, ready to be decoded."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (offset, bytes)
    shared: dict[str, int] = field(default_factory=dict)  # variable -> offset
    shared_bytes: int = 0
    registers: dict[str, type] = field(default_factory=dict)  # prefix or name -> type
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def declare_shared(self, alignment: int, kind: str, name: str, count: str | None) -> None:
        """Gives a variable its place behind the others."""
        offset = -(-self.shared_bytes // alignment) * alignment
        self.shared[name] = offset
        self.shared_bytes = offset + int(kind[1:]) // 8 * int(count or 1)

    def declare_register(self, name: str, kind: str) -> None:
        """`name` with its % is that of one register, of which scopes may each have one, or the prefix of many."""
        if self.registers.setdefault(name, REGISTER_TYPES[kind]) is not REGISTER_TYPES[kind]:
            raise UnknownPtx(f"{self.name}: {name} has two types")

    def register_type(self, name: str) -> type:
        """The type under which a register is kept."""
        return self.registers[name] if name in self.registers else self.registers[re.match(r"%[a-z]+", name)[0]]


SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%?[a-z_]+)(?:<\d+>)?")
INSTRUCTION = re.compile(r"(?:@(!?)(%[\w.]+)\s+)?([\w.:]+)\s*(.*)", re.S)
STATEMENT = re.compile(r"\s*(?:(?P<loc>\.loc[^\n]*)\n|(?P<label>\$\w+):|(?P<scope>[{}])|(?P<text>[^;]*);)", re.S)
IGNORED = (".pragma", ".param")


class Module:
    """A PTX file: kernels by name, each parsed when it is asked for."""

    def __init__(self, text: str):
        text = re.sub(r"\n\}(?=\s*// end inline asm)", " }", text)  # the end of a scope, not of a kernel
        text = re.sub(r"//[^\n]*", "", text)
        self.files = {m[1]: m[2].rpartition("/")[2] for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
        # name -> (parameters, body)
        blocks = r"\.{}\s+(?:\([^)]*\)\s*)?([\w$]+)\s*\(([^)]*)\)[^{{;]*\n\{{\n(.*?)\n\}}\n"
        self.entries = {m[1]: (m[2], m[3]) for m in re.finditer(blocks.format("entry"), text, re.S)}
        self.functions = {m[1]: (m[2], m[3]) for m in re.finditer(blocks.format("func"), text, re.S)}
        self.parsed: dict[str, Kernel] = {}
        self.shared = [m.groups() for m in re.finditer(r"^(?:\.weak\s+)?" + SHARED.pattern, text, re.M)]

    def find(self, stem: str, *tags: str) -> str:
        """The mangled name of the one kernel `stem` that has each of the template arguments `tags`, mangled as well."""
        found = [n for n in self.entries if f"{len(stem)}{stem}I" in n and all(tag in n for tag in tags)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} kernels are named {stem} with {tags}: {found}")
        return found[0]

    def kernel(self, name: str) -> Kernel:
        """The kernel with this mangled name."""
        if name not in self.parsed:
            self.parsed[name] = self._parse(name)
        return self.parsed[name]

    def edited(self, name: str, edit: Callable[[str], str]) -> "Module":
        """A copy in which the text of one kernel is another."""
        other = copy.copy(self)
        parameters, body = self.entries[name]
        other.entries = self.entries | {name: (parameters, edit(body))}
        other.parsed = {kept: kernel for kept, kernel in self.parsed.items() if kept != name}
        return other

    def _parse(self, name: str) -> Kernel:
        parameters, body = self.entries[name]
        kernel, offset = Kernel(name), 0
        for alignment, kind, parameter, count in PARAMETER.findall(parameters):
            size = int(kind[1:]) // 8 * int(count or 1)
            step = int(alignment or size)
            offset = -(-offset // step) * step
            kernel.parameters[parameter] = (offset, size)
            offset += size
        for alignment, kind, variable, count in self.shared:
            if re.search(re.escape(variable) + r"(?![\w$])", body):
                kernel.declare_shared(int(alignment), kind, variable, count)
        self._add_body(kernel, body)
        return kernel

    def _add_body(self, kernel: Kernel, body: str) -> None:
        place, at = "?", 0
        while match := STATEMENT.match(body, at):
            at = match.end()
            if match["loc"]:
                _, number, line, *_ = match["loc"].split()
                place = f"{self.files.get(number, number)}:{line}"
            elif match["label"]:
                kernel.labels[match["label"]] = len(kernel.code)
            elif match["text"]:
                self._add_statement(kernel, match["text"].strip(), place)
        if body[at:].strip():
            raise UnknownPtx(f"{kernel.name}: {body[at:].strip()[:200]!r}")

    def _add_statement(self, kernel: Kernel, text: str, place: str) -> None:
        if declared := REGISTERS.match(text):
            kernel.declare_register(declared[2], declared[1])
        elif declared := SHARED.match(text):
            kernel.declare_shared(int(declared[1]), *declared.groups()[1:])
        elif text.startswith("call"):
            self._inline(kernel, text)
        elif not text or text.startswith(IGNORED):
            return
        elif text.startswith("."):
            raise UnknownPtx(f"{kernel.name}: {text!r}")
        else:
            negated, guard, opcode, operands = INSTRUCTION.match(text).groups()
            instruction = Instruction(tuple(opcode.split(".")), split_operands(operands), guard, bool(negated), place)
            kernel.code.append(argument_move(kernel, instruction))

    def _inline(self, kernel: Kernel, text: str) -> None:
        """`call.uni (retval0), f, (param0, param1)`: the body of f, its registers renamed, moves for its parameters."""
        call = re.fullmatch(r"call\.uni\s*\(([^)]*)\),\s*([\w$]+),\s*\(([^)]*)\)", text)
        if call is None or call[2] not in self.functions:
            raise UnknownPtx(f"{kernel.name}: {text!r}")
        parameters, body = self.functions[call[2]]
        mark = f"call{len(kernel.code)}"
        names = dict(
            zip(re.findall(r"\.\w+\s+([\w$]+)\s*(?:,|$)", parameters), re.split(r",\s*", call[3]), strict=True)
        )
        names["func_retval0"] = call[1]
        for old, new in names.items():
            body = re.sub(rf"\[{re.escape(old)}(?![\w$])", f"[{new.strip()}", body)
        body = re.sub(r"%((?:p|rs|r|rd|f|fd)\d+)", rf"%\1.{mark}", body)
        body = re.sub(r"\$(L\w+)", rf"${mark}\1", body)
        body = re.sub(r"\bret;", f"bra ${mark}end;", body)
        self._add_body(kernel, body)
        kernel.labels[f"${mark}end"] = len(kernel.code)


def split_operands(text: str) -> tuple[str, ...]:
    """At the commas outside of brackets and braces."""
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip())


def argument_move(kernel: Kernel, instruction: Instruction) -> Instruction:
    """What is stored in or read from the parameter of a call becomes a move of a register of that name."""
    if instruction.opcode[:2] not in (("ld", "param"), ("st", "param")):
        return instruction
    stores = instruction.opcode[0] == "st"
    name = re.match(r"\[([\w$%.]+)", instruction.operands[0 if stores else 1])[1]
    if name in kernel.parameters or name.startswith("%"):
        return instruction
    kind, register = instruction.opcode[2], f"%{name}"
    kernel.declare_register(register, kind)
    other = instruction.operands[1 if stores else 0]
    operands = (register, other) if stores else (other, register)
    return Instruction(("mov", kind), operands, instruction.guard, instruction.negated, instruction.place)
