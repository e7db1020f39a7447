"""The tool itself, on kernels of a few lines: each mistake is a fault that says what it is."""

import random
from fractions import Fraction

import numpy as np
import pytest

from ptx.device import Array, Device
from ptx.memory import Fault
from ptx.parser import Module, UnknownPtx
from ptx.rounding import fma64, toward

Long = np.int64
ENTRY = """
.visible .entry _Z4testIvE(
	.param .u64 from,
	.param .u64 to
)
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .f32 	%f<9>;
	.reg .b64 	%rd<9>;
	.shared .align 4 .b8 rows[256];
	ld.param.u64 	%rd1, [from];
	ld.param.u64 	%rd2, [to];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	cvt.u32.u64 	%r2, %rd3;
	mov.u32 	%r3, rows;
	add.s32 	%r4, %r3, %r2;
{body}
	ret;

}}
"""
COPY = "ld.global.f32 %f1, [%rd4]; st.global.f32 [%rd5], %f1;"
ORDERS = [None, random.Random(1), random.Random(2)]


def run(
    body: str, threads: int = 64, blocks: int = 1, size: int = 64, order: random.Random | None = None
) -> np.ndarray:
    """`size` numbers at `from`, as many at `to`, which are returned."""
    device = Device("float32", order, Module(ENTRY.format(body=body)))
    given, out = device.array(np.arange(size) + 0.5, "float32"), device.empty((size,), "float32")
    device.launch("test", (), blocks, threads, given, out)
    return out.read()


def test_numbers_are_copied():
    assert np.array_equal(run(COPY), np.arange(64) + 0.5)


def test_a_warp_may_have_fewer_lanes():
    assert np.array_equal(run(COPY, threads=33, size=33), np.arange(33) + 0.5)


@pytest.mark.parametrize(
    "instruction", ["sin.approx.f32 %f1, %f2;", "atom.global.add.f32 %f1, [%rd1], %f2;", "add.sat.f32 %f1, %f1, %f1;"]
)
def test_an_instruction_without_a_rule_is_named(instruction):
    with pytest.raises(UnknownPtx, match=instruction.split()[0].replace(".", r"\.")):
        run(instruction)


@pytest.mark.parametrize(
    "body, message",
    [
        (COPY.replace("[%rd4]", "[%rd4+4]"), "load of 4 bytes in global memory out of bounds"),
        (COPY.replace("[%rd5]", "[%rd5+-4]"), "store of 4 bytes in global memory out of bounds"),
        ("st.shared.u32 [%r4+4], %r1;", "store of 4 bytes in shared memory out of bounds"),
        (COPY.replace("ld.global.f32 %f1, [%rd4]", "ld.global.f32 %f1, [%rd4+2]"), "misaligned load of 4 bytes"),
        ("ld.shared.f32 %f1, [%r4]; st.global.f32 [%rd5], %f1;", "shared memory of what nobody wrote"),
        ("ld.global.f32 %f1, [%rd5]; st.global.f32 [%rd5], %f1;", "global memory of what nobody wrote"),
        ("add.f32 %f1, %f2, %f2; st.global.f32 [%rd5], %f1;", "what is stored depends on a register that nobody wrote"),
        ("@%p1 st.global.u32 [%rd5], %r1;", "whether an instruction is executed depends on a register"),
        ("setp.eq.u32 %p1, %r1, 3; @%p1 mov.u32 %r5, 7; st.global.u32 [%rd5], %r5;", "depends on a register"),
        ("div.u32 %r5, %r1, %r1; st.global.u32 [%rd5], %r5;", "division of an integer by zero"),
        ("st.global.u32 [%rd2], %r1;", "lanes of one store write the same byte"),
        ("st.shared.u32 [%r4], %r1; xor.b32 %r5, %r4, 128; ld.shared.u32 %r6, [%r5];", "race|nobody wrote"),
        ("xor.b32 %r5, %r4, 4; st.shared.u32 [%r4], %r1; ld.shared.u32 %r6, [%r5];", "race in shared memory: read of"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $L; bar.sync 0; $L:", "a barrier waits for threads that have ended"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $L; bar.sync 0; bra $M; $L: bar.sync 0; $M:", "at different barriers"),
        ("shfl.sync.bfly.b32 %r5|%p2, %r1, 1, 31, 65535;", "lanes at a shuffle that its mask leaves out"),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 bra $L; shfl.sync.bfly.b32 %r5|%p2, %r1, 1, 31, -1; bra $M; "
            "$L: bar.sync 0; $M:",
            "a shuffle waits for lanes that do not come",
        ),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 bra $L; shfl.sync.bfly.b32 %r5|%p2, %r1, 1, 31, -1; $L:",
            "a shuffle waits for lane 0, which has ended|lanes that do not come",
        ),
        ("$L: bra $L;", "no end after"),
    ],
)
@pytest.mark.parametrize("order", ORDERS, ids=["in order", "random 1", "random 2"])
def test_a_mistake_is_a_fault(body, message, order, monkeypatch):
    monkeypatch.setattr("ptx.warp.MOST_STEPS", 5000)
    with pytest.raises(Fault, match=message):
        run(body, order=order)


TURN = "xor.b32 %r5, %r4, {}; st.shared.f32 [%r4], %f1; {} ld.shared.f32 %f2, [%r5]; st.global.f32 [%rd5], %f2;"


@pytest.mark.parametrize("order", ORDERS, ids=["in order", "random 1", "random 2"])
def test_barriers_order_what_threads_write_and_read(order):
    load = "ld.global.f32 %f1, [%rd4]; "
    assert np.array_equal(run(load + TURN.format(128, "bar.sync 0;"), order=order), (np.arange(64) ^ 32) + 0.5)
    assert np.array_equal(run(load + TURN.format(4, "bar.warp.sync -1;"), order=order), (np.arange(64) ^ 1) + 0.5)
    with pytest.raises(Fault, match=r"race|nobody wrote"):
        run(load + TURN.format(128, "bar.warp.sync -1;"), order=order)


def test_a_write_after_reads_of_several_threads_needs_a_barrier():
    read = "st.shared.u32 [%r4], %r1; bar.sync 0; ld.shared.u32 %r5, [rows]; {} setp.eq.u32 %p1, %r1, {}; "
    read += "@%p1 st.shared.u32 [rows], %r1;"
    for writer in (0, 5, 40):
        run(read.format("bar.sync 0;", writer) + COPY)
        with pytest.raises(Fault, match="race in shared memory: write of what another thread reads"):
            run(read.format("", writer))
        with pytest.raises(Fault, match=r"race in shared memory: (write|read) of what another thread"):
            run(read.format("bar.warp.sync -1;", writer))


def test_blocks_are_ordered_by_nothing():
    with pytest.raises(Fault, match="race in global memory: two threads write"):
        run(COPY, blocks=2)


def test_an_output_that_was_not_written_shows():
    with pytest.raises(Fault, match="128 of 256 bytes of an output were not written, the first is number 128"):
        run(COPY, threads=32)


def test_branches_part_lanes_and_they_meet_again():
    body = """
    setp.lt.u32 %p1, %r1, 5;
    @%p1 bra $A;
    mov.u32 %r5, 1;
    bra $B;
    $A: mov.u32 %r5, 2;
    $B: shfl.sync.idx.b32 %r6|%p2, %r5, 3, 31, -1;
    vote.sync.ballot.b32 %r7, %p1, -1;
    add.s32 %r6, %r6, %r7;
    cvt.rn.f32.u32 %f1, %r6;
    st.global.f32 [%rd5], %f1;"""
    for order in ORDERS:
        assert np.array_equal(run(body, threads=32, size=32, order=order), np.full(32, 2 + 31, np.float32))


def test_what_a_choice_leaves_out_may_be_unwritten():
    body = "setp.ge.u32 %p1, %r1, 0; selp.b32 %r5, %r1, %r6, %p1; cvt.rn.f32.u32 %f1, %r5; st.global.f32 [%rd5], %f1;"
    assert np.array_equal(run(body), np.arange(64))


def test_the_sectors_of_a_store_are_counted_by_its_width():
    def sectors(body: str) -> dict:
        device = Device("float32", None, Module(ENTRY.format(body=body)))
        given, out = device.array(np.arange(256), "float32"), device.empty((256,), "float32")
        device.launch("test", (), 1, 32, given, out)
        return dict(device.counts["test"].traffic.sectors)

    wide = "mul.wide.u32 %rd3, %r1, 16; add.s64 %rd5, %rd2, %rd3; "
    assert sectors(wide + "st.global.v4.u32 [%rd5], {%r1, %r1, %r1, %r1};") == {("st", 16): 16}
    assert sectors(wide + "st.global.u32 [%rd5], %r1; st.global.u32 [%rd5+4], %r1;") == {("st", 4): 32}
    assert sectors("st.global.u32 [%rd5], %r1;") == {("st", 4): 4}


def integers(body: str, a: int, b: int) -> int:
    """What an instruction makes of two registers of 32 bits."""
    read = f"mov.u32 %r5, {a}; mov.u32 %r6, {b}; {body} and.b32 %r8, %r7, 65535; shr.u32 %r9, %r7, 16; "
    read += "cvt.rn.f32.u32 %f1, %r8; st.global.f32 [%rd2], %f1; cvt.rn.f32.u32 %f1, %r9; st.global.f32 [%rd2+4], %f1;"
    low, high = run(read, threads=1, size=2)
    return int(high) << 16 | int(low)


# The first of two numbers is in the lower half: (1, -2) in float16 is 0x3C00 | 0xC000 << 16.
@pytest.mark.parametrize(
    "instruction, a, b, result",
    [
        ("max.f16x2", 0xC0003C00, 0x40003800, 0x40003C00),  # (1, -2), (0.5, 2)
        ("max.f16x2", 0x7E003C00, 0x40007E00, 0x40003C00),  # the number where one is NaN
        ("min.f16x2", 0xC0003C00, 0x40003800, 0xC0003800),
        ("max.bf16x2", 0xC0003F80, 0x40003F00, 0x40003F80),
        ("max.bf16x2", 0xFF803F80, 0xC0007FC0, 0xC0003F80),  # (1, -inf), (NaN, -2)
        ("set.ge.u32.f16x2", 0xC0003C00, 0x40003C00, 0x0000FFFF),
        ("set.ge.u32.bf16x2", 0xC0003F80, 0xC0007FC0, 0xFFFF0000),  # false for NaN
        ("set.lt.u32.bf16x2", 0xC0003F80, 0x40003F80, 0xFFFF0000),
    ],
)
def test_pairs_of_halves(instruction, a, b, result):
    assert integers(f"{instruction} %r7, %r5, %r6;", a, b) == result


def test_bytes_are_permuted():
    """0x1054: the bytes 4, 5, 0, 1 of a and b, from the lowest on."""
    assert integers("prmt.b32 %r7, %r5, %r6, 4180;", 0x44332211, 0x88776655) == 0x22116655
    with pytest.raises(UnknownPtx, match=r"sign of a byte"):
        integers("prmt.b32 %r7, %r5, %r6, 8;", 1, 2)


@pytest.mark.parametrize("instruction, result", [("max.s32", 15), ("min.s32", -16), ("max.u32", 0xFFFFFFFF)])
def test_a_warp_reduces_integers(instruction, result):
    body = f"add.s32 %r5, %r1, -16; redux.sync.{instruction} %r6, %r5, -1; "
    body += f"cvt.rn.f32.{instruction[-3:]} %f1, %r6; st.global.f32 [%rd5], %f1;"
    assert np.array_equal(run(body, threads=32, size=32), np.full(32, result, np.float32))


def test_a_reduction_waits_for_the_lanes_that_it_names():
    body = "setp.lt.u32 %p1, %r1, 9; @%p1 bra $L; redux.sync.max.s32 %r6, %r1, -1; $L:"
    with pytest.raises(Fault, match=r"a shuffle waits for lane 0, which has ended|lanes that do not come"):
        run(body)


def test_the_scope_of_an_assembler_text_does_not_end_a_kernel():
    """As nvcc writes it: with a brace at the beginning of a line."""
    scope = "// begin inline asm\n\t{add.f32 %f1, %f1, %f1;\n}\n\t// end inline asm\n"
    load, store = COPY.split("; ")
    assert np.array_equal(run(f"{load};\n{scope}{store}"), 2 * (np.arange(64) + 0.5))


def arithmetic(body: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One float32 instruction on 32 pairs."""
    kernel = "ld.global.f32 %f1, [%rd4]; ld.global.f32 %f2, [%rd4+128]; {} st.global.f32 [%rd5], %f3;"
    device = Device("float32", None, Module(ENTRY.format(body=kernel.format(body))))
    given: Array = device.array(np.concatenate([a, b]), "float32")
    out = device.empty((32,), "float32")
    device.launch("test", (), 1, 32, given, out)
    return out.read()


def test_roundings_are_those_of_the_names():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(32).astype(np.float32), rng.standard_normal(32).astype(np.float32)
    exact = a.astype(np.float64) * b + b
    down = arithmetic("fma.rm.f32 %f3, %f1, %f2, %f2;", a, b)
    nearest = arithmetic("fma.rn.f32 %f3, %f1, %f2, %f2;", a, b)
    assert (down <= exact).all() and (np.nextafter(down, np.float32(9e9)) > exact).all()
    assert np.array_equal(nearest, exact.astype(np.float32))
    cut = arithmetic("add.rz.f32 %f3, %f1, %f2;", a, b)
    assert (np.abs(cut) <= np.abs(a.astype(np.float64) + b)).all()


def test_the_larger_number_or_nan():
    a, b = np.full(32, np.nan, np.float32), np.arange(32, dtype=np.float32)
    a[:16] = 7
    expected = np.where(np.arange(32) < 16, np.maximum(7, b), np.nan)
    assert np.array_equal(arithmetic("max.NaN.f32 %f3, %f1, %f2;", a, b), expected, equal_nan=True)
    assert np.array_equal(arithmetic("max.NaN.f32 %f3, %f1, %f2;", b, a), expected, equal_nan=True)
    assert np.array_equal(arithmetic("max.f32 %f3, %f1, %f2;", a, b), np.fmax(a, b))


def test_fma_of_float64_is_rounded_once():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(2000), rng.standard_normal(2000)
    for c in (rng.standard_normal(2000), -(a * b), 1e-17 * rng.standard_normal(2000), np.zeros(2000)):
        exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
        assert np.array_equal(fma64(a, b, c), exact)


def test_fma_of_float64_beyond_the_finite_numbers():
    a, b = np.array([1e300, np.inf, np.inf, 1e200, 1e-200]), np.array([1e300, 1.0, 0.0, 1e200, 1e-200])
    c = np.array([1.0, 1.0, 1.0, -np.inf, 5e-324])
    with np.errstate(all="ignore"):
        assert np.array_equal(fma64(a, b, c), [np.inf, np.inf, np.nan, -np.inf, 5e-324], equal_nan=True)


@pytest.mark.parametrize("direction, below, above", [("rn", 1, 2), ("rz", 1, 1), ("rm", 1, 1), ("rp", 2, 2)])
def test_directions_of_rounding(direction, below, above):
    """A quarter and three quarters of the way from 1 to the next number of float32, in units of that step."""
    step = float(np.finfo(np.float32).eps)
    places = np.array([1 + step / 4, 1 + 3 * step / 4])
    assert list((toward(direction)(places, np.float32) - 1) / step + 1) == [below, above]
    mirrored = {"rm": "rp", "rp": "rm"}.get(direction, direction)
    assert list(-(toward(mirrored)(-places, np.float32) + 1) / step + 1) == [below, above]
