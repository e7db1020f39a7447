"""Model and loss as one module: what is trained, wrapped by DDP and saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batchnorm import running_statistics, training_batchnorms
from .passes import check_passes
from .random_state import RandomState
from .taps import Captured, Taps, cut_sources, in_graph
from .tracing import tracing

BATCHNORM = ("batch", "frozen")
# What a loss is given besides logits and targets: the taps of the forward pass, nothing, or the model and its input.
NEEDS = ("taps", "logits", "model")


class MarginTask(nn.Module):
    """A classifier together with its margin loss: one forward gives loss, logits and margin statistics.

        task = MarginTask(model, LargeMarginLoss(gamma=1.0), layers=("input", "layer3.*", "output"))
        task(x, y)["loss"].backward()

    Args:
        model: nn.Module, model(x) -> logits [N,C]. Not compiled and not wrapped: compile or wrap the task.
        loss: a loss of margin_kernels.losses.
        layers: the taps: names of modules as in model.named_modules(), glob patterns (`*` stays within one part of a
            dotted name, `**` crosses dots), "input" (the model's input), "output" (the logits), "name:index" for one
            call of a module called several times. Default: the input alone, the margin that input perturbations meet.
            Only for losses that measure at taps.
            `task.layers` holds the resolved names, in the order of the last dimension of distance and norm.
        passes: how losses that measure at taps come to their gradients.
            "loop": one activation-only backward pass for each competitor, and the ordinary backward of the loss.
            "split": the gradients of the parameters from those that the passes found (margin_kernels.split_backward),
            half a backward pass less, for top_k = 1 the cost of cross-entropy. The loss is then connected to the
            parameters, and not to the logits or activations in between. Needs no cross-entropy term (or
            auxiliary="pairwise", or all competitors), no batch norm in training mode, samples that are rows of every
            layer's output, and the compiled extension; with second_order=True, as with MarginSensitivityLoss, one
            competitor and a network that is linear piece by piece (margin_kernels.tangent), 4 F instead of 6 F.
            "auto": split where all that holds and top_k is at most 2, from where on it is not faster; else loop.
        batchnorm: for models with batch norm in training mode, where samples are coupled and the gradient of a summed
            gap is not the gradient of each gap. "batch": as the papers, ignore it (a warning, once); "frozen": norms
            are measured on a second forward pass with running statistics and the same dropout masks.

    Raises:
        ValueError: unknown layers or options, a compiled model, DataParallel; in forward, taps that cannot be measured,
            passes="split" where it is not possible, with the reason.

    The state dict holds the model under "model.". Hooks exist during a forward only.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        layers: Sequence[str] | str | None = None,
        passes: str = "auto",
        batchnorm: str = "batch",
    ) -> None:
        super().__init__()
        if batchnorm not in BATCHNORM:
            raise ValueError(f'batchnorm must be one of "batch", "frozen", got {batchnorm!r}')
        _check_model(model)
        if getattr(loss, "needs", None) not in NEEDS:
            raise TypeError(f"loss must be a loss of margin_kernels.losses, got {type(loss).__name__}")
        if layers is not None and loss.needs != "taps":
            raise ValueError(f"layers must be None for {type(loss).__name__}, which measures at no tap, got {layers!r}")
        self.model = model
        self.loss: Any = loss
        self.passes = check_passes(passes)
        self.batchnorm = batchnorm
        self._taps = Taps(model, ("input",) if layers is None else layers)
        self._warned = False
        self._compiled: Any = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the taps, in the order of the last dimension of distance and norm; () where the loss has none."""
        return self._taps.names if self.loss.needs == "taps" else ()

    def forward(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """Loss and statistics of inputs x [N,*] with targets y [N] int64.

        Returns a dict: loss [] ([N] for reduction="none") and output (logits [N,C]) with gradient, and the other fields
        that the loss measured, detached. For LargeMarginLoss: distance, norm, active (bool) [N,k,L], gap, index [N,k],
        nll [N]; for every loss the fields of what its `margins` returns. Under no_grad: output and what the logits
        alone show.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError("DataParallel is not supported: wrap the task in DistributedDataParallel")
        if not torch.is_grad_enabled():
            logits = self.model(x)
            return {"output": logits, **self.loss.logit_statistics(logits, y)}
        if self._compiled is not None and not tracing():
            return self._compiled(self, x, y)
        return self.uncompiled(x, y)

    def uncompiled(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """`forward` with gradients, as it is without `compile`."""
        if self.loss.needs == "logits":
            logits = self.model(x)
            measured = self.loss.margins(logits, y)
        elif self.loss.needs == "model":
            random = RandomState.now(x)
            source, sources = in_graph(x)
            logits = self.model(source)
            measured = self.loss.margins(logits, y, self.model, x, random, source)
            cut_sources(measured.loss, Captured(logits, [], sources=sources))
        else:
            logits, captured = self._forward(x)
            measured = self.loss.margins(logits, y, captured, self.passes)
        return {"output": logits, **measured._asdict()}

    def compile(self, **options: Any) -> None:
        """From now on a training step is one compiled graph, gradients of the parameters included; in place, as
        nn.Module.compile. Before it is saved, copied or wrapped in DistributedDataParallel, or after.

            task.compile(mode="max-autotune")
            task(x, y)["loss"].backward()

        The first step of each kind (shapes, train or eval, options of the loss, autocast) is compiled, others run. The
        gradients are computed with the loss: they are those of `loss` alone, and a term of your own on `output` raises
        an error in backward. What a module reads from Python, and is none of these, stays as it was at the first step.

        Args:
            options: of torch.compile: mode, backend, dynamic, options.

        Raises:
            ValueError: in forward, for a step that reads values of tensors, dropout under AdversarialMarginLoss or
                batchnorm="frozen", reduction="none".
        """
        from .compiled import CompiledStep  # what it imports takes a second

        self._compiled = CompiledStep(options)

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code, which is made again."""
        state = dict(super().__getstate__())
        if self._compiled is not None:
            state["_compiled"] = type(self._compiled)(self._compiled.options)
        return state

    def _forward(self, x: Any) -> tuple[Tensor, Captured]:
        """The logits of the ordinary forward pass, and the forward pass whose taps are measured."""
        training = training_batchnorms(self.model)
        if not training:
            captured = self._taps.capture(self.model, x)
            return captured.logits, captured
        if self.batchnorm == "frozen":
            with running_statistics(training), RandomState.now(x).replayed():
                captured = self._taps.capture(self.model, x)
            return self.model(x), captured
        self._check_coupling(training)
        captured = self._taps.capture(self.model, x)
        return captured.logits, captured

    def _check_coupling(self, training: list[_BatchNorm]) -> None:
        if self.loss.second_order and any(isinstance(module, nn.SyncBatchNorm) for module in training):
            raise ValueError(
                "SyncBatchNorm in training mode cannot be differentiated twice: use second_order=False, or "
                'batchnorm="frozen"'
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                "batch norm in training mode couples the samples of a batch, so the gradients of the margins are not "
                'those of single samples; batchnorm="frozen" measures them with running statistics in a second forward',
                stacklevel=4,
            )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ValueError("DataParallel is not supported: wrap the task in DistributedDataParallel")
    for name, module in model.named_modules():
        # By name: importing torch._dynamo for the class would take seconds.
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"its module {name!r}" if name else "it"
            raise ValueError(f"model must not be compiled, but {where} is: compile the task, not the model")
