"""What only a GPU can show: no host synchronisation, streams, CUDA graphs, more than 2^31 elements, bad targets.

The op tests themselves run there too: on a machine with a GPU the `backend` fixture adds the CUDA backends, marked gpu.
The comparison of the cases with the reference runs everywhere.
"""

import math

import pytest
import torch
from support.gpu_cases import Case, cases, classes, normal, outputs_and_gradients

from margin_kernels import AdversarialMarginLoss, LargeMarginLoss, MarginTask, backends, functional

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU_BACKENDS = ("cuda", "triton")


@pytest.fixture(params=GPU_BACKENDS)
def device_backend(request):
    """cuda and triton, with the GPU as the default device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.set_default_device("cuda")
    reason = backends.why_not(request.param, "competitors", (torch.zeros(1, 2),))
    if reason is not None:
        torch.set_default_device(None)
        pytest.skip(f"backend {request.param}: {reason}")
    yield request.param
    torch.set_default_device(None)


def assert_agrees_with_the_reference(case: Case, backend: str) -> None:
    ours, truth = outputs_and_gradients(case, backend), outputs_and_gradients(case, "reference")
    tolerance = 2e-2 if case.leaves[0].dtype == torch.bfloat16 else 2e-5
    for part, expected in zip(ours[0] + ours[1], truth[0] + truth[1], strict=True):
        assert part.dtype == expected.dtype
        error = (part.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert error <= tolerance, (case.op, case.name, error.item())


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case.op} {case.name}")
def test_every_case_agrees_with_the_reference_on_the_cpu(case):
    assert_agrees_with_the_reference(case, "auto")


@gpu
def test_every_case_agrees_with_the_reference_on_the_gpu(device_backend):
    for case in cases():
        assert_agrees_with_the_reference(case, device_backend)


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("second_order", [False, True])
def test_compiled_steps_have_the_gradients_of_eager(second_order, mode):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
    ).cuda()
    x, y = torch.rand(16, 3, 8, 8, device="cuda"), torch.arange(16, device="cuda") % 5
    loss = LargeMarginLoss(1.0, top_k=2, second_order=second_order, cross_entropy_weight=1.0)
    results = []
    for compiled in (False, True):
        task = MarginTask(model, loss, ("input", "1"), "loop")
        if compiled:
            task.compile(mode=mode)
        for _ in range(3):  # CUDA graphs are captured in the second call and replayed in the third
            model.zero_grad()
            task(x, y)["loss"].backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


@gpu
def test_nothing_waits_for_the_device(device_backend):
    everything = list(cases())
    for case in everything:  # compiles, loads modules, fills caches
        outputs_and_gradients(case, device_backend)
    torch.cuda.synchronize()
    expected = [[part.clone() for part in outputs_and_gradients(case, device_backend)[1]] for case in everything]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for case in everything:
            outputs = case.run(case.leaves, device_backend)
            weights = [torch.ones_like(o) for o in outputs]
            results.append(torch.autograd.grad(outputs, case.leaves, weights))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(part.isfinite().all() for result in results for part in result)
    again = [outputs_and_gradients(case, device_backend)[1] for case in everything]
    for one, two in zip(expected, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))  # bitwise repeatable


@gpu
def test_work_is_queued_on_the_current_stream(device_backend):
    """The inputs are written on a side stream after a long wait: a kernel on another stream would read the old ones."""
    for case in cases():
        expected = outputs_and_gradients(case, device_backend)[1]
        right = [leaf.detach().clone() for leaf in case.leaves]
        side = torch.cuda.Stream()
        with torch.no_grad():
            for leaf in case.leaves:
                leaf.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)
            with torch.no_grad():
                for leaf, values in zip(case.leaves, right, strict=True):
                    leaf.copy_(values)
            found = outputs_and_gradients(case, device_backend)[1]
        side.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), (case.op, case.name)


@gpu
def test_cuda_graphs_capture_and_replay_forward_and_backward(device_backend):
    for case in cases():
        weights = [normal(*o.shape, dtype=o.dtype, seed=7).detach() for o in case.run(case.leaves, device_backend)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                torch.autograd.grad(case.run(case.leaves, device_backend), case.leaves, weights)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(case.run(case.leaves, device_backend), case.leaves, weights)
        with torch.no_grad():
            for i, leaf in enumerate(case.leaves):
                new = normal(*leaf.shape, dtype=leaf.dtype, seed=50 + i)
                leaf.copy_(new.abs() + 0.5 if case.op == "margin_hinge" and i == 1 else new)
        graph.replay()
        torch.cuda.synchronize()
        eager = torch.autograd.grad(case.run(case.leaves, device_backend), case.leaves, weights)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True)), (case.op, case.name)


@gpu
def test_a_target_outside_the_classes_gives_nan_for_its_row(device_backend):
    logits, target = normal(4, 100), torch.tensor([3, 100, -1, 7])
    result = functional.competitors(logits, target, 2, backend=device_backend)
    (slope,) = torch.autograd.grad(result.nll.sum() + result.gap.sum(), logits)
    assert result.nll.isnan().tolist() == [False, True, True, False]
    assert result.gap.isnan().all(1).tolist() == [False, True, True, False]
    assert slope.isnan().all(1).tolist() == [False, True, True, False]
    assert slope[[0, 3]].isfinite().all()
    loss = functional.one_to_n(logits, target, reduction="none", backend=device_backend)
    assert loss.isnan().all()  # whose negatives the bad rows hold is unknown
    rows, index = normal(10, 33), torch.tensor([[1, 2], [3, 10], [-1, 0]])
    norm = functional.row_distance(rows, index, torch.tensor([0, 1, 2]), 2, backend=device_backend)
    assert norm.isnan().tolist() == [[False, False], [False, True], [True, False]]


@gpu
def test_more_than_two_to_the_31_elements(device_backend):
    free, _ = torch.cuda.mem_get_info()
    if free < 24e9:
        pytest.skip(f"needs 24 GB of free device memory, {free / 1e9:.0f} GB are free")
    n, count = 16_900, 128_256  # 2.17e9 logits in bfloat16
    logits = torch.zeros(n, count, dtype=torch.bfloat16)
    tail = normal(3, count, dtype=torch.bfloat16).detach()
    logits[-3:] = tail
    logits.requires_grad_()
    target = classes(n, count)
    result = functional.competitors(logits, target, 2, backend=device_backend)
    (slope,) = torch.autograd.grad(result.nll.sum(), logits)
    small = tail.clone().requires_grad_()
    expected = functional.competitors(small, target[-3:], 2, backend="reference")
    (expected_slope,) = torch.autograd.grad(expected.nll.sum(), small)
    assert torch.equal(result.competitor[-3:], expected.competitor)
    assert torch.allclose(result.nll[-3:], expected.nll, rtol=1e-5)
    assert torch.allclose(slope[-3:].float(), expected_slope.float(), atol=1e-2)
    assert torch.allclose(result.nll[:-3], torch.full((n - 3,), math.log(count)), rtol=1e-5)
    del slope, result

    long = logits.detach().view(1, -1)  # one row of 2.17e9 elements
    norm = functional.dual_norm([long], 2, 1, backend=device_backend)
    assert torch.allclose(norm[0, 0], tail.float().norm(), rtol=1e-4)
    del long, logits
    torch.cuda.empty_cache()


@gpu
@needs_gpu
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_training_step_on_the_gpu_is_the_one_on_the_cpu(p, second_order):
    """fp64, so that both devices' convolutions agree to rounding."""
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)
        ).double()
        x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.randint(0, 5, (6,))
        model, x, y = model.to(device), x.to(device), y.to(device)
        loss = LargeMarginLoss(gamma=2.0, p=p, top_k=3, second_order=second_order, cross_entropy_weight=1.0)
        out = MarginTask(model, loss, layers=("input", "0", "output"))(x, y)
        out["loss"].backward()
        found[device] = [out["loss"].detach(), *(parameter.grad for parameter in model.parameters())]
    for a, b in zip(found["cpu"], found["cuda"], strict=True):
        assert torch.allclose(a, b.cpu(), rtol=1e-9, atol=1e-12)


@gpu
@needs_gpu
@pytest.mark.parametrize("gradient", ["unrolled", "envelope", "first_order"])
@pytest.mark.parametrize("aggregation", ["min", "avg"])
def test_adversarial_margins_on_the_gpu_are_those_on_the_cpu_and_wait_for_nothing(aggregation, gradient):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).double()
    x = torch.randn(32, 6, dtype=torch.float64)
    y = torch.where(torch.arange(32) % 3 == 0, torch.randint(5, (32,)), net(x).argmax(1))
    found = {}
    for device in ("cpu", "cuda", "cuda"):  # the second run on the device has everything loaded
        net.to(device).zero_grad()
        inputs = x.to(device), y.to(device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if "cuda" in found else "default")
        try:
            out = MarginTask(net, AdversarialMarginLoss(aggregation=aggregation, gradient=gradient))(*inputs)
            out["loss"].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        slopes = [weight.grad.cpu() for weight in net.parameters()]
        found[device] = (out["loss"].detach().cpu(), out["distance"].cpu(), out["selected"].cpu(), slopes)
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-9, atol=1e-12)


@gpu
@needs_gpu
@pytest.mark.parametrize("second_order", [False, True])
def test_the_split_backward_on_the_gpu_is_the_loop_and_waits_for_nothing(second_order):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(16, 5)
    ).double()
    net, x, y = net.cuda(), torch.randn(32, 2, 6, 6, dtype=torch.float64).cuda(), torch.randint(5, (32,)).cuda()
    loss = LargeMarginLoss(5.0, second_order=second_order)
    found = {}
    for passes in ("loop", "split", "split"):  # the second time the graph has been tried out
        net.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if passes in found else "default")
        try:
            MarginTask(net, loss, ("input", "1"), passes)(x, y)["loss"].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found[passes] = [weight.grad.clone() for weight in net.parameters()]
    torch.testing.assert_close(found["split"], found["loop"], rtol=1e-9, atol=1e-12)
