"""Tasks sharded by FSDP2 take the same steps as one process with the whole batch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.many_processes import (
    ROWS,
    TAKEN,
    Net,
    batch,
    compare,
    expected,
    optimizer_of,
    parts,
    steps,
    task_of,
    whole,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import margin_kernels as mk
from margin_kernels.distributed import fully_shard_task
from margin_kernels.task.sharded import Sharded

Found = tuple[list[Tensor], list[float]]
EQUAL = {size: [ROWS // size] * size for size in (1, 2, 3, 4)}
UNITS: dict[str, Any] = {"units": ("blocks.*",)}
WAYS: dict[str, dict[str, Any]] = {
    "root alone": {},
    "units": UNITS,
    "head and stem too": {"units": ("blocks.*", "head", "stem")},
    "not resharded": {"units": ("blocks.*", "head"), "reshard_after_forward": False},
}
ONE_OF_A_KIND = (
    "hard",
    "hard and cross-entropy",
    "soft",
    "second order, loop",
    "sensitivity, tangent",
    "adversarial, avg",
)


def sharded(rank: int, size: int, name: str, options: dict[str, Any], counts: Any = None, **more: Any) -> Found:
    task = fully_shard_task(task_of(name, **more), **options)
    return steps(task, parts(counts or EQUAL[size], rank))


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_on_three_processes_whose_shards_differ(processes, name: str) -> None:
    compare(processes(3).run(sharded, name, WAYS["head and stem too"]), expected(name))


def strategies(rank: int, size: int, options: dict[str, Any], counts: list[int]) -> dict[str, str]:
    found: dict[str, str] = {}
    agree = Sharded.agree
    for name in TAKEN:

        def noted(self: Sharded, strategy: str, name: str = name) -> bool:
            found[name] = strategy if agree(self, strategy) else "loop"
            return found[name] == strategy

        Sharded.agree = noted
        try:
            task = fully_shard_task(task_of(name), **options)
            x, y = batch()
            rows = parts(counts, rank)
            task(x[rows], y[rows])["loss"].backward()
        finally:
            Sharded.agree = agree
    return found


def test_the_proof_goes_through_sharded_modules(processes) -> None:
    assert processes(2).run(strategies, WAYS["head and stem too"], [6, 6]) == [TAKEN] * 2


def test_all_processes_take_the_loop_where_one_must(processes) -> None:
    assert processes(2).run(strategies, UNITS, [12, 0]) == [dict.fromkeys(TAKEN, "loop")] * 2


def clipped(rank: int, size: int, name: str) -> Found:
    task = fully_shard_task(task_of(name), **UNITS)
    return steps(task, parts(EQUAL[size], rank), before=clip)


def clip(task: nn.Module) -> None:
    nn.utils.clip_grad_norm_(task.parameters(), 0.01)


@pytest.mark.parametrize("name", ["soft", "second order, loop"])
def test_clipping(processes, name: str) -> None:
    compare(processes(2).run(clipped, name), expected(name, before=clip))


def accumulated(rank: int, size: int, name: str, how: str) -> list[Tensor]:
    """Gradients of two halves of this process's part, added up."""
    task = fully_shard_task(task_of(name), **UNITS)
    x, y = batch()
    first = 6 * rank
    halves = [slice(first, first + 3), slice(first + 3, first + 6)]
    if how == "two forwards, one backward":
        (sum(task(x[half], y[half])["loss"] for half in halves) / 2).backward()
    elif how == "two forwards, two backwards":
        for loss in [task(x[half], y[half])["loss"] / 2 for half in halves]:
            loss.backward()
    else:
        for number, half in enumerate(halves):
            task.set_requires_gradient_sync(number == 1)
            (task(x[half], y[half])["loss"] / 2).backward()
    return [whole(parameter.grad) for parameter in task.parameters()]


@pytest.mark.parametrize("how", ["without sync", "two forwards, one backward", "two forwards, two backwards"])
@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_accumulation(processes, name: str, how: str) -> None:
    task = task_of(name)
    task(*batch())["loss"].backward()
    for found in processes(2).run(accumulated, name, how):
        for a, parameter in zip(found, task.parameters(), strict=True):
            torch.testing.assert_close(a, parameter.grad, rtol=1e-12, atol=1e-12)


def half_precision(rank: int, size: int, name: str) -> list[Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    task = fully_shard_task(task_of(name).float(), **UNITS, mp_policy=policy)
    x, y = batch()
    rows = parts(EQUAL[size], rank)
    task(x[rows].float(), y[rows])["loss"].backward()
    return [whole(parameter.grad) for parameter in task.parameters()]


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_mixed_precision(processes, name: str) -> None:
    """As near to float64 as the same model in bfloat16 on one process, within a factor."""
    exact, half = task_of(name), task_of(name).bfloat16()
    x, y = batch()
    exact(x, y)["loss"].backward()
    half(x.bfloat16(), y)["loss"].backward()
    found = processes(2).run(half_precision, name)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for a, p, q in zip(found[0], exact.parameters(), half.parameters(), strict=True):
        assert (a - p.grad).norm() <= 3 * (q.grad - p.grad).norm() + 0.02 * p.grad.norm(), name


def warned(rank: int, size: int, name: str) -> list[str]:
    task = fully_shard_task(task_of(name), **UNITS)
    x, y = batch()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        task(x, y)["loss"].backward()
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("name", ["hard", "sensitivity, tangent", "adversarial, avg"])
def test_a_step_warns_of_nothing(processes, name: str) -> None:
    assert processes(2).run(warned, name) == [[], []]


def forgotten(rank: int, size: int, name: str, when: str) -> Found:
    """A forward whose backward never comes, in each step."""
    task = fully_shard_task(task_of(name), **UNITS)
    rows = parts(EQUAL[size], rank)
    x, y = batch()

    def forward(task: nn.Module) -> None:
        with torch.set_grad_enabled(when != "under no_grad, after the backward"):
            task(x[rows], y[rows])

    if when != "before the step":
        return steps(task, rows, before=forward)

    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            task(x, y)
            return task(x, y)

    both = Both()
    both.task = task
    return steps(both, rows)


@pytest.mark.parametrize("when", ["before the step", "after the backward", "under no_grad, after the backward"])
@pytest.mark.parametrize("name", ["soft", "second order, loop", "adversarial, avg"])
def test_a_forward_without_backward(processes, name: str, when: str) -> None:
    """FSDP2 itself takes the parameters of before the optimizer's step where such a forward came after the backward."""
    compare(processes(2).run(forgotten, name, when), expected(name))


def wrong_on_one(rank: int, size: int, name: str) -> str:
    task = fully_shard_task(task_of(name), **UNITS)
    x, y = batch()
    rows = parts(EQUAL[size], rank)
    y = y.clone()
    if rank == 1:
        y[rows] = 7
    try:
        task(x[rows], y[rows])
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ["hard", "soft", "sensitivity, tangent", "adversarial, avg", "1-to-N"])
def test_an_error_of_one_process_is_one_of_all(processes, name: str) -> None:
    first, second = processes(2).run(wrong_on_one, name)
    assert "in [0, 5), got 7" in second
    assert "another process ended this step with an error" in first


def refused(rank: int, size: int) -> dict[str, str]:
    def words(call: Any) -> str:
        try:
            call()
        except (ValueError, TypeError) as error:
            return str(error)
        return "nothing"

    loss = mk.LargeMarginLoss(1.0)
    inner = mk.MarginTask(Net(), loss)
    fully_shard(inner.model)
    task = fully_shard_task(mk.MarginTask(Net(), loss))
    compiled = fully_shard_task(mk.MarginTask(Net(), loss))
    compiled.compile(backend="eager")
    x, y = batch()
    block = Net()
    fully_shard(block.blocks[0])
    return {
        "model": words(lambda: mk.MarginTask(fully_shard(Net()), loss)),
        "block": words(lambda: mk.MarginTask(block, loss)),
        "later": words(lambda: inner(x, y)),
        "twice": words(lambda: fully_shard_task(task)),
        "net": words(lambda: fully_shard_task(Net())),
        "unit": words(lambda: fully_shard_task(mk.MarginTask(Net(), loss), "block.0")),
        "tap": words(lambda: fully_shard_task(mk.MarginTask(Net(), loss), "input")),
        "compiled": words(lambda: compiled(x, y)),
        "explain": words(lambda: task.explain(x, y)),
        "wrapped": words(lambda: mk.MarginTask(DistributedDataParallel(Net()), loss)),
    }


def test_what_cannot_be_exact_is_refused(processes) -> None:
    first, second = processes(2).run(refused)
    assert first == second
    remedy = "make the task from the plain model and shard the task, margin_kernels.distributed.fully_shard_task(task)"
    assert first["model"] == f"model must not be sharded by fully_shard, but it is: {remedy}"
    assert "but its module 'blocks.0' is" in first["block"] and remedy in first["block"]
    assert remedy in first["later"]
    assert first["twice"] == "task must not be sharded yet: fully_shard was applied to it"
    assert first["net"] == "task must be a MarginTask, got Net"
    assert "names no module of Net; close names: blocks.0" in first["unit"]
    assert first["tap"] == "units must name modules of the model, got 'input'"
    assert "a sharded task cannot be compiled" in first["compiled"]
    assert "explain takes a task that is not sharded" in first["explain"]
    assert "wrap the task" in first["wrapped"]


def gathered(rank: int, size: int, name: str) -> dict[str, int]:
    """How often each group of parameters is gathered in a step."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    task = fully_shard_task(task_of(name), **UNITS)
    x, y = batch()
    rows = parts(EQUAL[size], rank)
    count: dict[str, int] = {}
    gather = _fsdp_param_group.foreach_all_gather

    def counted(params: Any, *args: Any, **kwargs: Any) -> Any:
        name = params[0]._param_fqn.removeprefix("model.").partition(".i")[0]
        count[name] = count.get(name, 0) + 1
        return gather(params, *args, **kwargs)

    task(x[rows], y[rows])["loss"].backward()
    _fsdp_param_group.foreach_all_gather = counted
    try:
        task(x[rows], y[rows])["loss"].backward()
    finally:
        _fsdp_param_group.foreach_all_gather = gather
    return count


# As docs/processes.md says. "all competitors" has 4 passes.
GATHERED = {"hard, loop": 3, "all competitors": 6, "soft": 2, "second order, loop": 2, "sensitivity, tangent": 2}


@pytest.mark.parametrize("name", [*GATHERED, "adversarial, avg", "1-to-N"])
def test_how_often_parameters_are_gathered(processes, name: str) -> None:
    times = GATHERED.get(name, 2 if name == "1-to-N" else 1)
    for found in processes(2).run(gathered, name):
        assert found == {"stem.weight": 1, "blocks.0": times, "blocks.1": times}


def lone_first_forward(rank: int, size: int, name: str) -> Found:
    """Before any backward a forward, and then other parameters."""
    task = fully_shard_task(task_of(name), **UNITS)
    rows = parts(EQUAL[size], rank)
    x, y = batch()
    optimizer = optimizer_of(task)
    task(x[rows], y[rows])
    for group in optimizer.param_groups:
        with torch.no_grad():
            for parameter in group["params"]:
                parameter.mul_(0.5)
    return steps(task, rows, optimizer=optimizer)


@pytest.mark.parametrize("name", ["hard, loop", "soft", "second order, loop"])
def test_parameters_that_change_after_the_very_first_forward(processes, name: str) -> None:
    task = task_of(name)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(0.5)
    compare(processes(2).run(lone_first_forward, name), steps(task, slice(None)))


@pytest.mark.parametrize("name", ["second order, loop", "sensitivity, tangent", "hard, loop"])
def test_parameters_sharded_over_some_processes_after_the_forward(processes, name: str) -> None:
    options = {**UNITS, "reshard_after_forward": 2}
    compare(processes(4).run(sharded, name, options), expected(name))


def kept_gathered(rank: int, size: int, name: str) -> Found:
    task = fully_shard_task(task_of(name), **UNITS)
    task.set_reshard_after_backward(False)
    return steps(task, parts(EQUAL[size], rank))


@pytest.mark.parametrize("name", ["hard, loop", "second order, loop"])
def test_parameters_that_stay_gathered_after_a_backward(processes, name: str) -> None:
    compare(processes(2).run(kept_gathered, name), expected(name))


def listen(module: nn.Module, args: Any, output: Tensor) -> None:
    output.register_hook(lambda gradient: None)


def one_is_wrong(rank: int, size: int, what: str) -> str:
    task = fully_shard_task(task_of("soft"), **UNITS)
    if rank == 1 and what == "gamma":
        task.loss.gamma = [1.0, 2.0]
    if rank == 1 and what == "class_weight":
        task.loss.class_weight = [1.0, 2.0]
    if what == "hook":
        task.model.blocks[0].register_forward_hook(listen)
    x, y = batch()
    try:
        task(x, y)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("what", ["gamma", "class_weight"])
def test_options_that_differ_end_all_processes(processes, what: str) -> None:
    first, second = processes(2).run(one_is_wrong, what)
    assert second.startswith(f"{what} must")
    assert "another process ended this step with an error" in first


def test_a_hook_where_fsdp_has_its_own_is_refused(processes) -> None:
    for words in processes(2).run(one_is_wrong, "hook"):
        assert "the output of a module that fully_shard shards by itself, would run in every pass" in words
