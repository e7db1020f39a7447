"""Whole training steps of mnist_cnn against their time floor and against cross-entropy.

step   forward, loss, backward, SGD with momentum; batch 128; taps at the input and the four hidden layers
loop   with cross-entropy; floor: the cross-entropy step + k activation-only backward passes, each timed alone in the
       same run; by FLOPs (k + 3) / 3 of cross-entropy
split  with the pairwise logistic loss instead; floor: one pass less; by FLOPs (k + 2) / 3
ratio  to the cross-entropy step of the same run

python benchmarks/step.py --out benchmarks/results/step_cpu.json
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import environment, interleaved
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from margin_kernels import LargeMarginLoss, MarginTask
from margin_kernels.experiments import models

NETWORK, TAPS = "mnist_cnn", ("input", *models.hidden_taps("mnist_cnn"))


class Step:
    """One training step of a fresh network on one fixed batch; every instance starts from the same weights."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.model = models.build(NETWORK, (1, 28, 28), 10)
        self.x, self.y = torch.rand(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def run(self, loss: Callable[[], Tensor]) -> None:
        self.optimiser.zero_grad()
        loss().backward()
        self.optimiser.step()


def cross_entropy_step(batch: int) -> Callable[[], None]:
    step = Step(batch)
    return lambda: step.run(lambda: cross_entropy(step.model(step.x), step.y))


def margin_step(batch: int, k: int, p: float, passes: str = "loop", backend: str = "auto") -> Callable[[], None]:
    step = Step(batch)
    auxiliary = "pairwise" if passes == "split" else "cross_entropy"
    loss = LargeMarginLoss(1.0, p, top_k=k, cross_entropy_weight=1.0, auxiliary=auxiliary, backend=backend)
    task = MarginTask(step.model, loss, TAPS, passes)
    return lambda: step.run(lambda: task(step.x, step.y)["loss"])


class TappedForward:
    """Logits of one forward pass, and the bare pass: a class difference's gradients at all taps, on a kept graph."""

    def __init__(self, step: Step) -> None:
        x = step.x.detach().requires_grad_()
        self.taps: list[Tensor] = [x]
        handles = [
            step.model.get_submodule(name).register_forward_hook(lambda m, i, output: self.taps.append(output))
            for name in TAPS[1:]
        ]
        self.logits = step.model(x)
        for handle in handles:
            handle.remove()
        one_hot = nn.functional.one_hot
        self.cotangent = (one_hot((step.y + 1) % 10, 10) - one_hot(step.y, 10)).float()

    def bare_pass(self) -> None:
        torch.autograd.grad(self.logits, self.taps, self.cotangent, retain_graph=True)


def activation_pass(batch: int) -> Callable[[], None]:
    """One backward pass of a class difference to all taps: no weight gradients, no norms."""
    return TappedForward(Step(batch)).bare_pass


def cross_entropy_step_with_pass(batch: int) -> Callable[[], None]:
    """The cross-entropy step with one bare pass before its backward: the least memory that measuring the taps takes."""
    step = Step(batch)

    def loss() -> Tensor:
        forward = TappedForward(step)
        forward.bare_pass()
        return cross_entropy(forward.logits, step.y)

    return lambda: step.run(loss)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of live bytes allocated during one call by PyTorch's allocator."""
    call()  # the optimiser's buffers exist from here on
    gc.collect()  # what other runs left behind would count as freed by this one
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def tap_bytes(batch: int) -> int:
    """Bytes of one set of tap gradients in float32."""
    step = Step(batch)
    sizes = [step.x.numel()]
    for name in TAPS[1:]:
        step.model.get_submodule(name).register_forward_hook(lambda m, i, output: sizes.append(output.numel()))
    step.model(step.x)
    return 4 * sum(sizes)


def measure(batch: int, rounds: int, backends: list[str]) -> dict[str, Any]:
    runs = {"cross-entropy": cross_entropy_step(batch), "pass": activation_pass(batch)}
    cases = [("loop", k, p, backend) for backend in backends for k in (1, 9) for p in (2, float("inf"))]
    cases += [("split", k, 2, backends[0]) for k in (1, 2, 9)]
    for passes, k, p, backend in cases:
        runs[f"{passes} {k} {p} {backend}"] = margin_step(batch, k, p, passes, backend)
    device = torch.get_default_device().type
    times = interleaved(runs, rounds, warmup=3, inner=10 if device == "cuda" else 1, device=device)
    table = []
    for passes, k, p, backend in cases:
        beside = k if passes == "loop" else k - 1
        seconds, floor = times[f"{passes} {k} {p} {backend}"], times["cross-entropy"] + beside * times["pass"]
        table.append(
            {
                "passes": passes,
                "k": k,
                "p": "inf" if p == float("inf") else p,
                "backend": backend,
                "milliseconds": seconds * 1e3,
                "floor_milliseconds": floor * 1e3,
                "to_floor": seconds / floor,
                "to_cross_entropy": seconds / times["cross-entropy"],
                "floor_to_cross_entropy": floor / times["cross-entropy"],
                "by_flops": (beside + 3) / 3,
            }
        )
        print(table[-1], flush=True)
    return {
        "network": NETWORK,
        "batch": batch,
        "taps": list(TAPS),
        "device": device,
        "threads": torch.get_num_threads(),
        "cross_entropy_milliseconds": times["cross-entropy"] * 1e3,
        "pass_milliseconds": times["pass"] * 1e3,
        "steps": table,
    }


def memory(batch: int) -> dict[str, Any]:
    """Peak bytes of a step, and of cross-entropy plus one set of tap gradients."""
    baseline, taps = peak_bytes(cross_entropy_step(batch)), tap_bytes(batch)
    result: dict[str, Any] = {
        "cross_entropy_bytes": baseline,
        "tap_gradient_bytes": taps,
        "cross_entropy_with_one_bare_pass_bytes": peak_bytes(cross_entropy_step_with_pass(batch)),
        "margin_bytes": {},
    }
    for passes, k in (("loop", 1), ("loop", 9), ("split", 1), ("split", 9)):
        peak = peak_bytes(margin_step(batch, k, 2, passes))
        result["margin_bytes"][f"{passes} {k}"] = peak
        result[f"to_cross_entropy_plus_taps_{passes}_k{k}"] = peak / (baseline + taps)
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small batch and few rounds: shows that it runs")
    arguments = parser.parse_args()
    batch, rounds = (16, 3) if arguments.quick else (128, 15)
    torch.set_default_device(arguments.device)
    result: dict[str, Any] = {"environment": environment(), "memory": memory(batch), "time": []}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        result["time"].append(measure(batch, rounds, ["auto", "reference"]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
