"""Whole training steps of networks against their time floor and against cross-entropy.

step     forward, loss, backward, SGD with momentum on one fixed batch; learning rate 0, so that the arithmetic is done
         and all steps of a network share its weights
floor    the passes that the step needs (modes.py), each timed by itself in the same run (floors.py)
ratios   of medians of one interleaved run; FLOPs of matrix products and convolutions as PyTorch counts them, which the
         package's kernel for the input of a thin convolution is not; peak memory of PyTorch's allocator during a step
refused  a step that cannot be taken on a network stands in the table with the reason

python benchmarks/step.py --networks mnist_cnn mlp800 --out benchmarks/results/step_cpu.json
"""

import argparse
import fnmatch
import gc
import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from floors import OWN, Passes
from launches import launches
from modes import ADVERSARIAL, CROSS_ENTROPY, Floor, Loss, Mode, compiled, number_of_passes, of_network
from networks import NETWORKS
from timing import environment
from torch import Tensor
from torch.nn.functional import cross_entropy

from margin_kernels.floors import class_difference
from margin_kernels.task.capture import Taps
from margin_kernels.testing import flops
from margin_kernels.timing import interleaved, peak_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Step:
    """Training steps of one network on one fixed batch."""

    def __init__(self, name: str, batch: int, dtype: str, channels_last: bool, digits_steps: int) -> None:
        torch.manual_seed(0)
        network = NETWORKS[name]
        self.hidden = network.hidden
        if name in ADVERSARIAL:
            from losses import digits, trained  # asks for scikit-learn

            self.model = trained(name, 100, digits_steps)
            self.x, self.y = digits(batch)
        else:
            self.model = network.build()
            self.x, self.y = torch.rand(batch, *network.shape), torch.randint(network.classes, (batch,))
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.dtype, self.channels_last = DTYPES[dtype], channels_last
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.x.device.type, self.dtype)

    def run(self, loss: Loss) -> None:
        with self.autocast():
            value = loss(self.x, self.y)
        value.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def passes(self) -> Passes:
        return Passes(self.model, self.x, self.y, self.hidden, self.autocast)


class Row:
    """What is known about one step: its loss, or why it is refused; FLOPs, peak bytes and floor."""

    def __init__(self, mode: Mode, step: Step) -> None:
        self.mode, self.refused = mode, ""
        self.auto = False  # whether passes="auto" takes this one
        self.compiled: Callable[[], None] | str = ""
        try:
            loss = mode.of(step.model, step.hidden)
            self.run = partial(step.run, loss)
            self.run()  # what it is refused for; the optimiser's buffers
            measured = {} if mode.module is None or mode.passes else mode.task(step.model, step.hidden)(step.x, step.y)
            self.floor: Floor = mode.floor(measured)
            self.flops = flops(self.run)
            self.bytes = peak_bytes(self.run)
            self.launches = launches(self.run)
        except (ValueError, RuntimeError) as error:
            step.optimiser.zero_grad()
            self.refused = str(error).splitlines()[0]

    def compile(self, step: Step) -> None:
        loss = compiled(self.mode, step.model, step.hidden)
        if isinstance(loss, str):
            self.compiled = loss
            return
        try:
            step.run(loss)
            self.compiled = partial(step.run, loss)
        except (ValueError, RuntimeError) as error:
            self.compiled = str(error).splitlines()[0]

    @property
    def head(self) -> dict[str, Any]:
        mode = self.mode
        return {"loss": mode.loss, "order": mode.order, "k": mode.k, "taps": mode.taps, "passes": mode.passes}


def bare_pass_step(step: Step) -> Loss:
    """Cross-entropy with one bare pass to the taps before its backward: the least memory that measuring them takes."""

    taps = Taps(step.model, ("input", *step.hidden))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        captured = taps.capture(step.model, x)
        logits, edges = captured.logits, [tap.edge for tap in captured.taps]
        torch.autograd.grad(logits, edges, class_difference(logits, y), retain_graph=True)
        return cross_entropy(logits, y)

    return loss


def measure(name: str, step: Step, rows: list[Row], threads: int, rounds: int, with_compiled: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    device = torch.get_default_device().type
    passes = step.passes()
    parts = passes.runs(step.optimiser)
    runs = {row.mode.name: row.run for row in rows if not row.refused}
    compiled_runs = {row.mode.name: row.compiled for row in rows if callable(row.compiled)}
    times = interleaved(
        {**parts, **runs, **{f"compiled {key}": run for key, run in compiled_runs.items()}},
        rounds,
        warmup=1,
        inner=3 if device == "cuda" else 1,
        device=device,
    )
    part_flops = {part: flops(run) for part, run in parts.items()}
    seconds = {
        **times,
        "pass to input": min(times["pass to input"], times[OWN]),
        "backward": min(times["backward"], times["pass to outputs"] + times["weights"]),
    }
    base = rows[0]
    table: list[dict[str, Any]] = []
    for row in rows:
        cell: dict[str, Any] = row.head
        if row.refused:
            cell["refused"] = row.refused
        else:
            taken = times[row.mode.name]
            floor = sum(count * seconds[part] for part, count in row.floor.items())
            floor_flops = sum(count * part_flops[part] for part, count in row.floor.items())
            cell |= {
                "auto": row.auto,
                "number_of_passes": round(number_of_passes(row.floor), 2),
                "floor": row.floor,
                "milliseconds": taken * 1e3,
                "floor_milliseconds": floor * 1e3,
                "to_floor": taken / floor,
                "to_cross_entropy": taken / times[base.mode.name],
                "floor_to_cross_entropy": floor / times[base.mode.name],
                "flops_to_cross_entropy": row.flops / base.flops,
                "flops_to_floor": row.flops / floor_flops,
                "peak_bytes": row.bytes,
                "memory_to_cross_entropy": row.bytes / base.bytes,
                "memory_to_cross_entropy_and_outputs": row.bytes / (base.bytes + passes.output_bytes()),
                "launches": row.launches,
            }
            if with_compiled:
                cell["compiled"] = row.compiled
            if row.mode.name in compiled_runs:
                faster = times[f"compiled {row.mode.name}"]
                cell["compiled"] = {
                    "milliseconds": faster * 1e3,
                    "to_eager": faster / taken,
                    "to_compiled_cross_entropy": faster / times[f"compiled {base.mode.name}"],
                }
        table.append(cell)
    return {
        "network": name,
        "batch": len(step.x),
        "dtype": str(step.dtype).removeprefix("torch."),
        "channels_last": step.channels_last,
        "device": device,
        "threads": threads,
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "taps": [tap.name for tap in passes.captured.taps],
        "cross_entropy_milliseconds": times[base.mode.name] * 1e3,
        "cross_entropy_bytes": base.bytes,
        "tap_gradient_bytes": passes.tap_bytes(),
        "output_gradient_bytes": passes.output_bytes(),
        "parts": {part: {"milliseconds": times[part] * 1e3, "flops": part_flops[part]} for part in parts},
        "steps": table,
    }


def mark_auto(rows: list[Row], step: Step) -> None:
    """Marks, of the rows of one loss that differ in their passes, the one that passes="auto" takes."""
    taken: dict[str, str] = {}
    for row in rows:
        mode = row.mode
        if mode.module is None or not mode.passes or row.refused:
            continue
        key = mode.name.removesuffix(mode.passes)
        if key not in taken:
            with step.autocast():
                taken[key] = mode.auto_takes(step.model, step.hidden, step.x, step.y)
        row.auto = taken[key] == mode.passes


def rows_of(name: str, step: Step, patterns: list[str], with_compiled: bool) -> list[Row]:
    rows = []
    for mode in of_network(name, NETWORKS[name].classes):
        if mode is not CROSS_ENTROPY and not any(fnmatch.fnmatchcase(mode.name, pattern) for pattern in patterns):
            continue
        start = time.perf_counter()
        row = Row(mode, step)
        if with_compiled and not row.refused:
            row.compile(step)
        rows.append(row)
        print(f"{name}: {mode.name}: {row.refused or f'prepared in {time.perf_counter() - start:.1f} s'}", flush=True)
    mark_auto(rows, step)
    return rows


def show(part: dict[str, Any]) -> None:
    for cell in part["steps"]:
        label = ", ".join(str(cell[key]) for key in ("loss", "order", "k", "taps", "passes"))
        if "refused" in cell:
            print(f"{part['network']}: {label}: {cell['refused']}")
            continue
        print(
            f"{part['network']}, {part['threads']} threads: {label}: {cell['milliseconds']:.1f} ms, "
            f"{cell['to_floor']:.2f} of its floor, {cell['to_cross_entropy']:.2f} of cross-entropy "
            f"(floor {cell['floor_to_cross_entropy']:.2f}, FLOPs {cell['flops_to_cross_entropy']:.2f}), "
            f"memory {cell['memory_to_cross_entropy']:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["mnist_cnn"])
    parser.add_argument("--modes", nargs="+", default=["*"], metavar="PATTERN", help='only such rows: "large*loop"')
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="bfloat16: under autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also compiled, where the loss can be")
    parser.add_argument("--batch", type=int, default=None, help="instead of the network's own")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="a small batch and few rounds: shows that it runs")
    arguments = parser.parse_args()
    warnings.filterwarnings(
        "ignore", message="batch norm in training mode couples"
    )  # said once by the table's refusals
    torch.set_default_device(arguments.device)
    rounds = arguments.rounds or (2 if arguments.quick else 11)
    result: dict[str, Any] = {"environment": environment(), "rounds": rounds, "networks": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks:
        torch.compiler.reset()
        network = NETWORKS[name]
        batch = arguments.batch or (network.cpu_batch if arguments.device == "cpu" else network.gpu_batch)
        batch = max(2, batch // 8) if arguments.quick else batch
        torch.set_num_threads(arguments.threads[-1])
        step = Step(name, batch, arguments.dtype, arguments.channels_last, 20 if arguments.quick else 300)
        rows = rows_of(name, step, arguments.modes, arguments.compile)
        bare = peak_bytes(partial(step.run, bare_pass_step(step)))
        for threads in arguments.threads:
            part = measure(name, step, rows, threads, rounds, arguments.compile)
            part["cross_entropy_with_one_bare_pass_bytes"] = bare
            show(part)
            result["networks"].append(part)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")  # as far as it has come
        del step, rows
        gc.collect()
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
