"""The input gradient of a convolution with few input channels, by a compiled kernel or as one product and col2im.

    z = W * x,   x [N,Ci,H,W'], W [Co,Ci,kh,kw]:      d x = col2im( W^T g ),   W as [Co, Ci kh kw], g [N, Co, positions]

A network's first convolution has 1 or 3 input channels, and the CPU library pads them to a vector of 16: for the 5x5
convolution of mnist_cnn the gradient at the input then costs as much as that of the second convolution, which has 16
times its work. Training never asks for it; a pass to the input does, for each competitor.

The kernel, the op margin_kernels::convolution_input_gradient, sums in registers and writes no columns. A pass that
carries a graph takes col2im, or autograd's own way where the output channels are too few: the tangent reads its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from ..backends import EXTENSION, is_functorch_wrapped
from ..tracing import is_plain, recording, tracing
from .request import Tap

# Output channels for each input channel from which col2im is faster than the library: measured, MKL-DNN on AVX-512.
FEW = 16
# Input channels up to which the compiled kernel is the faster way whatever the outputs: measured, AVX-512 and AVX2.
THIN = 4
# Elements of a kernel: W^T g then holds at most four times the elements of g.
SMALL = 64


class ThinConvolution(NamedTuple):
    """A convolution that alone reads the tapped x: the edge of its output, its weight and padding, and (H, W') of x."""

    output: GradientEdge
    weight: Tensor
    padding: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient in x [N,Ci,H,W'] from that in the output [N,Co,*]; differentiable in both factors."""
        if EXTENSION is not None and not torch.is_grad_enabled() and (recording() or self._is_plain(gradient)):
            kernel = torch.ops.margin_kernels.convolution_input_gradient
            return kernel(gradient, self.weight, self.padding, self.dilation, self.size)
        outputs, inputs = self.weight.shape[:2]
        if outputs < FEW * inputs:
            shape = (len(gradient), inputs, *self.size)
            return conv2d_input(shape, self.weight, gradient, 1, self.padding, self.dilation)
        # bmm, for matmul would make it one product of transposed copies.
        columns = torch.bmm(self.weight.flatten(1).t().expand(len(gradient), -1, -1), gradient.flatten(2))
        # A clone, for what col2im returns keeps the memory of the columns, kh kw times its own.
        return F.fold(columns, self.size, self.weight.shape[2:], self.dilation, self.padding).clone()

    def _is_plain(self, gradient: Tensor) -> bool:
        """Whether there is memory to read: no subclass, no transform, no tracing, and not the layout of a library."""
        return (
            type(gradient) is Tensor
            and gradient.layout == torch.strided
            and not tracing()
            and not is_functorch_wrapped(gradient)
            and not is_functorch_wrapped(self.weight)
        )


def may_be_read_by_one(tap: Tap, batch: int) -> bool:
    """Whether a tap has the shape of what `thin_convolution` is for."""
    return len(tap.shape) == 4 and tap.shape[0] == batch


def thin_convolution(reader: tuple[Any, int] | None, tap: Tap) -> ThinConvolution | None:
    """The convolution that alone reads the tap, where there is a faster way to its gradient. reader: the one node that
    reads the tap, and the number of its edge; None where there are several."""
    if reader is None or reader[0].name() != "ConvolutionBackward0" or reader[1] != 0:
        return None
    node = reader[0]
    if node._saved_groups != 1 or node._saved_transposed or tuple(node._saved_stride) != (1, 1):
        return None
    weight = node._saved_weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64) or not is_plain(weight):
        return None
    outputs, inputs, height, width = weight.shape
    thin = outputs >= FEW * inputs or (EXTENSION is not None and inputs <= THIN)
    if not thin or height * width > SMALL:
        return None
    padding, dilation = _pair(node._saved_padding), _pair(node._saved_dilation)
    return ThinConvolution(GradientEdge(node, 0), weight, padding, dilation, (tap.shape[2], tap.shape[3]))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    """The value of each direction; padding="valid" saves one for both."""
    return values[0], values[-1]
