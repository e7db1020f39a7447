"""The proof that samples do not meet: the Jacobian of what passes has no entry between samples, the rest is named."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from margin_kernels.gradients import autograd_graph, structure
from margin_kernels.gradients.autograd_graph import Graph
from margin_kernels.gradients.structure import Structure, Where

pytestmark = pytest.mark.skipif(autograd_graph.refusal() is not None, reason="the compiled extension is missing")
N = 3  # samples, of 6 features


def features(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).requires_grad_()


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read(function, x: Tensor) -> tuple[Structure, Where | None]:
    """What the graph of function(h) says, and where the batch is in h."""
    h = 2 * x
    edge = get_gradient_edge(h)
    found = Structure(Graph(function(h)), [edge], N)
    return found, found.where.get((edge.node, edge.output_nr))


def rows_by_time(h: Tensor) -> Tensor:
    torch.manual_seed(0)
    return nn.LSTM(6, 4, dtype=h.dtype)(h[:, None])[0][:, 0]


ROW_LOCAL = {
    "a matrix turned over and back": lambda h: h.t().square().t(),
    "a matrix product from the left": lambda h: (weights(5, 6) @ h.t()).t(),
    "a product with a vector": lambda h: torch.mv(h, weights(6)).sin(),
    "the largest entry, kept and not": lambda h: h.max(1, keepdim=True).values + h.min(1).values[:, None],
    "features repeated": lambda h: h.repeat(1, 2) + h.repeat(1, 1, 1)[0].repeat(1, 2),
    "windows": lambda h: h.unfold(1, 2, 1).sum(-1),
    "complex numbers and back": lambda h: torch.view_as_real(torch.view_as_complex(h.view(N, 3, 2)) * (1 + 2j))[..., 0],
    "a diagonal of each sample": lambda h: h.view(N, 2, 3).diagonal(0, 1, 2),
    "padded features": lambda h: F.pad(h, (1, 2)).square(),
    "stacked behind the batch": lambda h: torch.stack([h, h.sin()], 1).flatten(1),
    "normalised features": lambda h: F.layer_norm(h, (6,)),
    "a convolution": lambda h: F.conv1d(h[:, None], weights(2, 1, 3)).flatten(1),
    "attention over the features": lambda h: F.scaled_dot_product_attention(*[h.view(N, 1, 3, 2)] * 3).flatten(1),
}


@pytest.mark.parametrize("name", ROW_LOCAL)
def test_what_passes_has_a_gradient_of_each_sample_alone(name):
    x = features()
    found, where = read(ROW_LOCAL[name], x)
    assert found.refusal() is None and found.findings == []
    assert where == Where(6, proven=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: ROW_LOCAL[name](2 * x).reshape(N, -1), x)  # [N,*,N,6]
    for n in range(N):
        for m in range(N):
            assert bool(jacobian[n, :, m].any()) == (n == m)


COUPLED = {
    "stacked samples": (lambda h: torch.stack([h[0], h[1], h[2]]), "StackBackward0: it stacks tensors along the batch"),
    "joined samples": (lambda h: torch.cat([h[:1], h[1:]]), "CatBackward0: it joins or parts the batch"),
    "sorted samples": (lambda h: h.sort(0).values, "SortBackward0: it goes over the samples"),
    "pooled samples": (
        lambda h: F.avg_pool2d(h[None, None], (3, 1), 1, (1, 0))[0, 0],
        "AvgPool2DBackward0: it works on the dimension that holds the batch",
    ),
    "weights of a convolution": (
        lambda h: F.conv1d(weights(1, 1, 4), h[:, None, :2])[0],
        "ConvolutionBackward0: its weights depend on the samples",
    ),
    "a matrix of products": (lambda h: h @ h.t(), "MmBackward0: it multiplies activations of different samples"),
    "a vector of samples": (
        lambda h: torch.mv(weights(N, N), h[:, 0]),
        "MvBackward0: it multiplies activations of different samples",
    ),
    "scales of a batch norm": (
        lambda h: F.batch_norm(weights(4, N), None, None, h[:, 0], h[:, 1], training=True).t(),
        "NativeBatchNormBackward0: its weights depend on the samples",
    ),
    "scales of a layer norm": (
        lambda h: F.layer_norm(weights(4, N), (N,), h[:, 0]).t(),
        "NativeLayerNormBackward0: its weights depend on the samples",
    ),
    "a layer norm over the samples": (
        lambda h: F.layer_norm(h.t(), (N,)).t(),
        "NativeLayerNormBackward0: it works on the dimension that holds the batch",
    ),
    "samples that attend to each other": (
        lambda h: F.scaled_dot_product_attention(*[h[None, None]] * 3)[0, 0],
        "ScaledDotProductFlashAttentionForCpuBackward0: the samples attend to each other",
    ),
    "windows of samples": (lambda h: h.unfold(0, 1, 1)[..., 0], "UnfoldBackward0: it goes over the samples"),
    "a repeated batch": (
        lambda h: h.repeat(2, 1).view(2, N, 6).sum(0),
        "RepeatBackward0: it repeats the batch",
    ),
    "a padded batch": (
        lambda h: F.pad(h, (0, 0, N, 0)).view(2, N, 6).sum(0),
        "ConstantPadNdBackward0: it pads the batch",
    ),
    "a batch that is shifted by padding": (
        lambda h: F.pad(h, (0, 0, 1, -1)),
        "ConstantPadNdBackward0: it pads the batch",
    ),
    "a diagonal through the samples": (
        lambda h: h[:, :N].diagonal(),
        "DiagonalBackward0: it takes a diagonal through the samples",
    ),
    "two readings of one matrix": (
        lambda h: (square := h[:, :N] * 1) + square.t(),
        "its input is read with the batch in two different dimensions",
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_samples_is_named(name):
    function, sentence = COUPLED[name]
    found, _ = read(function, features())
    assert found.refusal().startswith("the samples are coupled: ") and found.refusal().endswith(sentence)
    assert found.refusal(trusting=True) == found.refusal()


def test_samples_as_time_steps_are_coupled():
    found, _ = read(rows_by_time, features(torch.float32))
    assert found.refusal() == "the samples are coupled: MkldnnRnnLayerBackward0: the samples are its time steps"


class Swapped(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one * other


def hooked(h: Tensor) -> Tensor:
    module = Swapped()
    module.register_full_backward_hook(lambda module, before, behind: None)
    return module(h, h.sin())


UNKNOWN = {
    "a convolution along the batch": (
        lambda h: F.conv1d(h.t()[:, None], weights(1, 1, 1))[:, 0].t(),
        "ConvolutionBackward0: the batch is not dimension 0",
    ),
    "two inputs of a module with hooks": (
        hooked,
        "BackwardHookFunctionBackward: it hands on another of its inputs",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_named_and_may_be_trusted(name):
    function, sentence = UNKNOWN[name]
    found, _ = read(function, features())
    assert found.refusal() == f"that the samples are independent is not proven: {sentence}"
    assert found.refusal(trusting=True) is None


def place(rule, shape, stride, into, number=0, output=0, **saved) -> int:
    """What `rule` says of a node that only a GPU makes."""
    node = SimpleNamespace(**{f"_saved_{name}": value for name, value in saved.items()})
    return rule(structure._At(node, output, torch.Size(shape), stride, N, number, [number], torch.Size(into), []))


def test_recurrent_layers_of_cudnn():
    rule = structure._recurrent_cudnn
    assert place(rule, (N, 5, 4), 20, (N, 5, 6), batch_first=True) == 30
    assert place(rule, (5, N, 4), 4, (5, N, 6), batch_first=False) == 6
    for error, options in (
        (r"its states are read or given", {"number": 1}),
        (r"its sequences are packed", {"batch_sizes": (2, 1)}),
        (r"the samples are its time steps", {"batch_first": False}),
    ):
        with pytest.raises((structure._Unknown, structure._Couples), match=error):
            place(rule, (N, 5, 4), 20, (N, 5, 6), **{"batch_first": True, **options})


def test_fused_cells_of_cuda():
    rule = structure._cell
    assert place(rule, (N, 4), 4, (N, 16)) == 16
    with pytest.raises(structure._Couples, match="its biases depend on the samples"):
        place(rule, (N, 4), 4, (16,))
