"""Strategy "split": weight gradients of a margin loss from the activation gradients that its norms were measured on.

With constant norms the loss depends on the network through the gaps alone, and backpropagation is linear and treats
samples one by one. With w[n,j] = d loss / d gap[n,j] and G_j the activation gradients of the pass of competitor j,

    d loss / d a[n] = sum_j w[n,j] G_j[n]        at every activation a of the network

is known as soon as the loss is, and only the gradients of the weights remain: one forward pass, k passes, and half a
backward pass, (k + 2) F where the loop takes (k + 3) F; for k = 1 the price of cross-entropy.

The tapped path are the nodes between the logits and the taps; a node of it that a parameter feeds is a layer node. Each
pass also records the gradients at the outputs of the layer nodes. In the backward of the loss these are combined, and
one run of the engine starts at all layer nodes together while the edges along the tapped path are cut: what leaves the
path, weights and what lies behind the taps, gets its gradient in the ordinary way, shared weights and any kind of layer
included. The direction of the soft competitor is that of the cross-entropy too, which then costs nothing.

Exact only if samples do not interact: row n of every activation may depend on sample n alone. The graph is read to
prove it (`structure`). The loss then is a function of parameters, and of tensors that entered the model with a graph of
their own; it is not connected to the activations in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..process_group import WORLD, Group
from ..sharding import crosses, possible
from ..tracing import is_plain, recording, tracing
from . import autograd_graph
from .autograd_graph import LEAF, Edge, gradients_at, leaves_like, like_output, made_before, shape_of
from .loop import Loop, Passes, columns, norms_of, of_competitors, pass_gradients, sole_readers, without_autocast
from .plan import Cotangents, Plan, Seeds, make_plan
from .proofs import Proof
from .request import Captured, Request, Tap
from .structure import by_sample, is_unknown_function, per_sample, registered

# Nodes that must compute the gradient of their input: this one crashes without, for channels-last tensors on the CPU.
WITH_INPUT = {"NativeGroupNormBackward0"}
# Rounding between a pass and the same pass with other factors, relative to the largest gradient.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# Steps between two trials of a split that is not proven, once it has passed the first ones.
TRIAL_EVERY = 1024


def due(step: int) -> bool:
    """Whether a step is tried: 1, 2, 4, 8, ... and every 1024th."""
    return step & (step - 1) == 0 or step % TRIAL_EVERY == 0


class NotExact(Exception):
    """Why a strategy would not give the gradient, or cannot be run."""


class Trials:
    """The trials of a split that its user asked for by name and that the graph does not prove. A task has its own.

    At steps 1, 2, 4, 8, ... of a kind of graph and every 1024th: a pass with drawn factors of the samples' cotangents,
    0 for half of them, must give the recorded gradients times these factors. A failure on any process is one on all:
    they tell each other at the steps 1, 2, 4, 8, ... and every 1024th of all kinds, which are the same on each.

    alone: nothing is told to other processes
    """

    def __init__(self, alone: bool = False) -> None:
        self._alone = alone
        self._count = 0
        self._steps: Counter[Any] = Counter()
        self._passed: dict[Any, int] = {}
        # The words for the first trial that failed.
        self._failed: str | None = None
        self._generator = torch.Generator().manual_seed(0)

    def step(self, kind: Any, exact: Callable[[], bool] | None) -> None:
        """Takes one step of a kind of graph, with its trial, None where nothing is in doubt. Raises ValueError where a
        trial has failed."""
        self._count += 1
        self._steps[kind] += 1
        step, last = self._steps[kind], self._passed.get(kind, 0)
        if exact is not None and due(step):
            if exact():
                self._passed[kind] = step
            else:
                self._failed = self._failed or (
                    f"the samples are coupled, as the trial of step {step} shows; gradients may have been wrong since "
                    f"step {last + 1}"
                )
        group = Group(None if self._alone or recording() else WORLD)
        failed = self._failed
        if group.size > 1:
            failed = None
            told = [int(self._failed is None)]
            if due(self._count) and group.lowest(told, "the agreement on a trial of the split") == [0]:
                failed = self._failed or "the samples are coupled, as the trial of another process shows"
        if failed is not None:
            raise ValueError(f'passes="split" is not possible: {failed}. Use passes="loop"')

    def factors(self, batch: int) -> Tensor:
        """[N]: 0 for a random half of the samples, between 0.5 and 2 for the others."""
        factors = 0.5 + 1.5 * torch.rand(batch, generator=self._generator)
        factors[torch.randperm(batch, generator=self._generator)[: batch // 2]] = 0
        return factors


class Split:
    """The split backward of one forward pass. Raises NotExact with the reason where it would not be exact.

    Args:
        request: what the loss asks for
        captured: the forward pass, whose logits the loss is computed from
        logits: the logits of the loss
        trials: given where the user asked for the split by name: nodes of which nothing is known are verified by a
            trial, not refused
        refused: receives the reasons that do not hinder a further look, all but the last, which NotExact has; None:
            the first is raised
    """

    name = "split"
    second_order = False

    def __init__(
        self,
        request: Request,
        captured: Captured,
        logits: Tensor,
        trials: Trials | None = None,
        refused: list[str] | None = None,
    ) -> None:
        self.request, self.captured, self._trials, self._refused = request, captured, trials, refused
        self._check_request(request, captured, logits)
        self._graph = captured.graph
        self._key: Any = None
        self._recalled: Proof | None = None
        self._plan = make_plan(captured, request, self._recall)
        if not self._plan.taps:
            raise NotExact("no tap needs a pass")
        if self._recalled is None:
            proof = self._prove()
            if self._key is not None and captured.proofs is not None:
                captured.proofs.add(self._key, proof)
        else:
            proof = self._recalled
            self._take(proof)
        nodes, self._proof = self._graph.nodes, proof
        # Where passes record gradients: the outputs of the layer nodes, and taps behind which the backward goes on.
        self.edges = [GradientEdge(nodes[i], output) for i, output in proof.edges]
        self._strides: Sequence[int] = proof.strides
        self._recorded: list[list[Tensor]] = []
        self._logits: Tensor | None = None

    @classmethod
    def reasons(cls, request: Request, captured: Captured, logits: Tensor) -> list[str]:
        """Every reason that is known why this strategy would not be exact; none where it would."""
        refused: list[str] = []
        try:
            cls(request, captured, logits, None, refused)
        except NotExact as reason:
            refused.append(str(reason))
        return refused

    def _refuse(self, reason: str) -> None:
        """A reason that does not hinder a further look."""
        if self._refused is None:
            raise NotExact(reason)
        self._refused.append(reason)

    def _remembers(self) -> bool:
        """Whether what a graph has shown holds for the next one that looks alike: where it is a proof, and not
        the tangent's, which reads more."""
        return type(self) is Split and self._trials is None and self._refused is None and not tracing()

    def _key_of(self, taps: list[Tap]) -> Any:
        """All that a proof starts from, besides the arguments that it reads; None where it cannot be compared."""
        graph, places, captured = self._graph, self._graph.places, self.captured
        if not graph.signature or any(tap.edge.node not in places for tap in taps):
            return None
        return (
            graph.signature,
            captured.batch,
            graph.root.output_nr,
            tuple((places[tap.edge.node], tap.edge.output_nr, tap.shape, tap.batch_dim) for tap in taps),
            tuple((places.get(edge.node), edge.output_nr) for edge in captured.inputs),
            tuple(places.get(mark.grad_fn) for mark in captured.sources),
            registered(),
            possible(),
        )

    def _recall(self, taps: list[Tap]) -> Sequence[int]:
        """The strides of the batch in the taps of a pass: of the proof of an earlier graph that looks the same, where
        there is one, else as this graph shows."""
        proofs = self.captured.proofs
        if proofs is not None and self._remembers():
            self._key = self._key_of(taps)
            self._recalled = None if self._key is None else proofs.find(self._key, self._graph)
        return self.captured.strides(taps) if self._recalled is None else self._recalled.taps

    def _take(self, proof: Proof) -> None:
        """What an earlier graph has shown, of this one."""
        nodes = self._graph.nodes
        self._made = [nodes[i] for i in proof.made]
        self.parameters = [self._tensor(nodes[i], output, leaf) for i, output, leaf in proof.inputs]
        self._check_now()

    def _tensor(self, node: Any, output: int, leaf: bool) -> Tensor:
        """What the loss has a gradient for: a leaf, or a stand-in for a tensor with a graph of its own."""
        variable: Tensor = node.variable if leaf else self._graph.tensor_at(node, output)
        return variable

    def _prove(self) -> Proof:
        """Reads the graph. Raises NotExact with what it does not prove."""
        self._structure = self.captured.structure(self._plan.taps)
        self._along = self._structure.along
        self._find_inputs()
        names = self._graph.names
        self.parameters = [self._tensor(node, output, names[node] == LEAF) for node, output in self._inputs]
        self._check_now()
        self._check_graph()
        self._layer_nodes = [node for node in self._graph.nodes[1:] if node in self._along and self._leaving(node)]
        edges = [edge for node in self._layer_nodes for edge in self._outputs(node)]
        self._ends = {
            (tap.edge.node, tap.edge.output_nr): tap.edge
            for tap in self._plan.taps
            if tap.edge.node in self._trained and tap.edge.node not in self._along
        }
        edges += self._ends.values()
        places = self._graph.places
        sinks, turned = self._turned()
        readers = sole_readers(self._graph, self._plan.taps, self.captured.batch)
        return Proof(
            read=tuple((places[node], name, value) for node, name, value in self._structure.read),
            taps=tuple(self._plan.strides),
            readers=tuple(None if reader is None else (places[reader[0]], reader[1]) for reader in readers),
            made=tuple(places[node] for node in self._made),
            inputs=tuple((places[node], output, names[node] == LEAF) for node, output in self._inputs),
            edges=tuple((places[edge.node], edge.output_nr) for edge in edges),
            strides=tuple(self._stride(edge) for edge in edges),
            leaves_at_top=bool(self._leaving(self._graph.top)),
            sinks=tuple(sinks),
            turned=tuple(turned),
        )

    def _check_request(self, request: Request, captured: Captured, logits: Tensor) -> None:
        unreadable = autograd_graph.refusal()
        if unreadable is not None:
            raise NotExact(unreadable)
        if torch.compiler.is_compiling():
            raise NotExact("torch.compile is at work: compile the task with task.compile()")
        if captured.begin is None:
            raise NotExact("the activations were kept by the caller: it takes a MarginTask")
        if captured.logits is not logits:
            raise NotExact('the norms are measured on a forward pass of their own (batchnorm="frozen")')
        if logits.dim() != 2 or logits.shape[1] == 1:
            raise NotExact("it takes logits [N, C] of at least two classes")
        if captured.slots:
            raise NotExact("each position of a sample has passes of its own")
        if captured.batch == 0:
            raise NotExact("the batch is empty")
        if request.second_order != self.second_order:
            raise NotExact("the norms are differentiated" if request.second_order else "the norms are constants")
        if request.space != "logit":
            self._refuse('the passes of space="probability" do not hold the gradients of the logits')
        if request.outside is not None:
            self._refuse(request.outside)

    def _find_inputs(self) -> None:
        """The edges at which the loss ends: parameters and other leaves, and tensors that entered the model with a
        graph of their own, which was made before the forward pass or led to the model's arguments."""
        assert self.captured.begin is not None
        graph, begin = self._graph, self.captured.begin
        given = {(edge.node, edge.output_nr) for edge in self.captured.inputs}
        # Not parameters: what gives the model's input, or a frozen stem, its place in the graph.
        sources = {mark.grad_fn for mark in self.captured.sources}
        self._inputs: list[Edge] = []
        self._made = [graph.top]  # nodes of this forward pass
        seen = {graph.top}
        known: set[Edge] = set()
        ending = set()
        for node in self._made:
            if node in sources:
                continue
            for edge in graph.edges[node]:
                following = edge[0]
                if following is None:
                    continue
                if graph.names[following] == LEAF or edge in given or made_before(following, begin):
                    ending.add(node)
                    if edge not in known:
                        known.add(edge)
                        self._inputs.append(edge)
                elif following not in seen:
                    seen.add(following)
                    self._made.append(following)
        self._ending = known
        self._trained = graph.above(ending)

    def _check_now(self) -> None:
        """What no signature tells: the types of parameters, and hooks."""
        wrapped = [parameter for parameter in self.parameters if not is_plain(parameter)]
        if wrapped:
            self._refuse(
                f"a parameter is a {type(wrapped[0]).__name__}: it is sharded or wrapped, and its gradient needs the "
                "ordinary backward"
            )
        # Beside other terms of the user's the nodes behind the taps run twice, once for each: as good as once where the
        # backward is linear, but not for hooks and Functions.
        hooked = self._hooked()
        if hooked:
            self._refuse(
                f"an activation has a hook ({hooked[0].name()}): register_hook, retain_grad or a module's backward "
                "hook must see the backward of the loss"
            )

    def _check_graph(self) -> None:
        begin = self.captured.begin or 0
        if any(made_before(node, begin) for node in self._along):
            self._refuse("a tapped tensor also enters the model by way of operations outside it")
        if crosses(self._graph.nodes):
            self._refuse("an activation is a DTensor, whose gradient needs the ordinary backward")
        if not self._inputs:
            self._refuse("no parameter requires a gradient")
        for node in self._made:
            if node not in self._along and is_unknown_function(node):
                self._refuse(f"nothing is known of {node.name()} behind the taps or between parameters and layers")
                break
        # What follows is read off a graph in which samples do not interact.
        reason = self._structure.refusal(trusting=self._trials is not None)
        if reason is not None:
            raise NotExact(reason)
        if self._structure.findings and recording():
            raise NotExact(f"a compiled step cannot be tried, and {self._structure.refusal()}")

    def _hooked(self) -> list[Any]:
        """The nodes of this forward pass that have hooks of the user's."""
        return [node for node in self._graph.hooked() if node in self._made]

    def _leaving(self, node: Any) -> list[int]:
        """The edges of a node of the tapped path that lead to parameters and not along the path."""
        return [
            number
            for number, edge in enumerate(self._graph.edges[node])
            if edge[0] is not None and edge[0] not in self._along and (edge in self._ending or edge[0] in self._trained)
        ]

    def _outputs(self, node: Any) -> list[GradientEdge]:
        outputs = sorted({output for _, _, output in self._graph.readers[node]})
        return [GradientEdge(node, output) for output in outputs]

    def _stride(self, edge: GradientEdge) -> int:
        where = self._structure.where.get((edge.node, edge.output_nr))
        if where is None:
            raise NotExact(
                f"where the batch is in the output of {edge.node.name()}, of shape "
                f"{list(shape_of(edge.node, edge.output_nr))}, is not known"
            )
        return where.stride

    @property
    def logits(self) -> Tensor:
        """What the loss reads in the place of the logits. Made when it is first asked for, and forgotten by `attach`:
        its node holds this strategy."""
        if self._logits is None:
            self._logits = self._start()
        return self._logits

    def _start(self) -> Tensor:
        """The logits as made by a node whose inputs are those of the loss, and whose backward is `_gradients`."""
        return GivenGradients.apply(self.captured.logits.detach(), self._gradients, *self.parameters)

    def norms(self, target: Tensor, index: Tensor, direction: Tensor | None = None) -> Tensor:
        """D [N,k,L] as `Loop.norms`; the passes record what `attach` needs. direction: of the soft competitor, where it
        is known. Raises ValueError where a trial fails."""
        self._index, self._target = index, target
        plan, request = self._plan, self.request
        with without_autocast(target.device.type), torch.set_grad_enabled(request.second_order):
            cotangents = Cotangents(self.captured, target, request, False, direction)
            passes = Passes(self.captured, plan.taps, self.edges, self._readers())
            norms: list[Tensor] = []
            for competitor in index.unbind(1):
                seeds = self._seeds(cotangents.of(competitor))
                measured, recorded = pass_gradients(plan, passes, seeds, request.second_order)
                measured = self._record(measured, recorded)
                if not norms:
                    self._try(plan, passes, seeds)
                norms.append(norms_of(measured, plan, self.captured, request))
            return columns(of_competitors(norms), plan.sources, index, self.captured.logits.dtype)

    def _readers(self) -> list[tuple[Any, int] | None]:
        nodes = self._graph.nodes
        return [None if reader is None else (nodes[reader[0]], reader[1]) for reader in self._proof.readers]

    def measured(self, target: Tensor, index: Tensor) -> Tensor:
        """D as a constant, nothing recorded."""
        return Loop(self.request, self.captured, self.logits).measured(target, index)

    def _seeds(self, seeds: Seeds) -> Seeds:
        """The cotangents that a pass is to start from."""
        return seeds

    def _record(self, measured: list[Tensor], recorded: list[Tensor]) -> list[Tensor]:
        """Takes one more pass: the gradients that are measured, and those at `edges`. Returns what is measured."""
        self._recorded.append(recorded)
        return measured

    @property
    def recorded_bytes(self) -> int:
        """Memory of the gradients that the passes have recorded."""
        storages = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for r in self._recorded for g in r}
        return sum(storages.values())

    def _try(self, plan: Plan, passes: Passes, seeds: Seeds) -> None:
        if self._trials is None or not self._structure.findings:
            return
        kind = tuple(node.name() for node in self._graph.nodes if node in self._along)
        several = self.captured.batch > 1
        self._trials.step(kind, partial(self._is_exact, self._trials, plan, passes, seeds) if several else None)

    def _is_exact(self, trials: Trials, plan: Plan, passes: Passes, seeds: Seeds) -> bool:
        """Whether a pass with other factors of the samples gives the recorded gradients times these."""
        factors = trials.factors(self.captured.batch)
        scaled = []
        for seed in seeds:
            factor = factors.to(self._target.device)
            scaled.append(None if seed is None else (seed.detach() * factor.to(seed.dtype).unsqueeze(1)))
        _, changed = pass_gradients(plan, passes, (scaled[0], scaled[1]), second_order=False)
        exact = True
        for whole, part, stride in zip(self._recorded[-1], changed, self._strides, strict=True):
            whole = whole.detach()
            tolerance = 2 * ROUNDING.get(whole.dtype, 1e-3) * whole.abs().amax()
            expected = whole * per_sample(factors.to(whole.device, whole.dtype), whole.shape, stride)
            none = by_sample(part, stride, self.captured.batch)[(factors == 0).to(whole.device)]
            fits = ((part - expected).abs() <= tolerance).all() & (none == 0).all()
            exact = exact and bool(fits | ~whole.isfinite().all())
        return exact

    def attach(self, loss: Tensor) -> Tensor:
        """`loss` [] or [N], computed from `logits`, whose node has the network's parameters as its inputs."""
        self._logits = None
        return loss

    def known(self, loss: Tensor, gradient: Tensor, weights: Tensor) -> Tensor:
        """`loss` [] whose gradient in the logits is known, with its way to the parameters. weights [N,k]: those of the
        recorded gradients in it."""
        total: Tensor = KnownGradient.apply(loss, gradient, weights, self._found, *self.parameters)
        return total

    def _check_late_hooks(self) -> None:
        late = self._hooked()
        if late:
            raise RuntimeError(
                f"an activation got a hook after the forward pass ({late[0].name()}), which the split backward does "
                'not run: register it before, or use passes="loop"'
            )

    def _gradients(self, outer: Tensor) -> list[Tensor | None]:
        """The gradients in `parameters`, from the one in `logits`."""
        # In z a pair's direction has 1 at the competitor, that of the soft competitor -1 at the label.
        soft = self.request.soft
        weights = -outer.gather(1, self._target.unsqueeze(1)) if soft else outer.gather(1, self._index)
        return self._found(outer, weights)

    def _found(self, outer: Tensor, weights: Tensor) -> list[Tensor | None]:
        """The gradients in `parameters`, from the one in the logits and the weights of the recorded gradients."""
        self._check_late_hooks()
        keep_graph = self._graph.still_to_run(self._made)
        weights = weights if self._plan.scale == 1 else weights / self._plan.scale
        roots, seeds = list(self.edges), self._combined(weights, keep_graph)
        if self._proof.leaves_at_top:
            roots.append(get_gradient_edge(self.captured.logits))
            seeds.append(outer)
        return self._run(roots, seeds, keep_graph)

    def _run(self, roots: list[GradientEdge], seeds: list[Tensor], keep_graph: bool) -> list[Tensor | None]:
        """What reaches the inputs from gradients at `roots`, without going along the tapped path."""
        if not roots:
            return [None] * len(self.parameters)
        zeros: dict[Any, Tensor] = {}
        sinks = [like_output(self._graph.nodes[place], output, zeros) for place, output in self._proof.sinks]
        ends = leaves_like([*self.parameters, *sinks])
        with self._graph.redirected(self._proof.turned, ends):
            found = gradients_at(ends, roots, seeds, keep_graph)
        return list(found[: len(self.parameters)])

    def _combined(self, weights: Tensor, keep_graph: bool) -> list[Tensor]:
        """sum_j w[n,j] G_j[n] at every edge, in the dtype of G; in the memory of G_0 where it is G_0's alone."""
        first = self._recorded[0] if self._recorded else []
        in_place = not keep_graph and not recording()
        uses = Counter(gradient.untyped_storage().data_ptr() for gradient in first) if in_place else Counter()
        combined = []
        for i, (gradient, stride) in enumerate(zip(first, self._strides, strict=True)):
            factors = [per_sample(w, gradient.shape, stride) for w in weights.unbind(1)]
            memory = gradient.untyped_storage()
            own = in_place and uses[memory.data_ptr()] == 1 and memory.nbytes() == gradient.numel() * gradient.itemsize
            own = own and (len(factors) == 1 or gradient.dtype == weights.dtype)  # half precision: summed in float32
            total = gradient.mul_(factors[0]) if own else gradient * factors[0]
            for recorded, factor in zip(self._recorded[1:], factors[1:], strict=True):
                total.addcmul_(recorded[i], factor)
            combined.append(total.to(gradient.dtype))
        if not keep_graph:
            self._recorded.clear()
        return combined

    def _turned(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
        """The sinks, and the edges along the tapped path, which are to lead nowhere or to sinks, and those to the
        inputs of the loss, which are to lead to leaves without hooks; as in a Proof."""
        numbers = {edge: i for i, edge in enumerate(self._inputs)}
        places = self._graph.places
        sinks: list[tuple[int, int]] = []
        turned: list[tuple[int, int, int]] = []
        for node in self._made:
            along, with_input = node in self._along, self._graph.names[node] in WITH_INPUT
            for number, edge in enumerate(self._graph.edges[node]):
                following, output = edge
                if following is None:
                    continue
                if edge in numbers:
                    turned.append((places[node], number, numbers[edge]))
                elif along and (following in self._along or following not in self._trained or edge in self._ends):
                    if with_input:
                        sinks.append((places[following], output))
                    turned.append((places[node], number, len(numbers) + len(sinks) - 1 if with_input else -1))
        return sinks, turned


class GivenGradients(torch.autograd.Function):
    """A value whose gradients in its inputs a function of its own finds, from the one that arrives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Callable[[Tensor], list[Tensor | None]], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        check_first_derivative()
        return (None, None, *ctx.gradients(grad))


class KnownGradient(torch.autograd.Function):
    """A loss [] whose gradient in the logits is known; from that, and from the weights of the recorded gradients in it,
    a function finds those in the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        gradient: Tensor,
        weights: Tensor,
        found: Callable[[Tensor, Tensor], list[Tensor | None]],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.found = found
        ctx.save_for_backward(gradient, weights)
        return loss.clone()  # no view, so that a user may add to it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        check_first_derivative()
        gradient, weights = ctx.saved_tensors
        return (None, None, None, None, *ctx.found(gradient * grad, weights * grad))


def check_first_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError('the split backward has no second derivative (create_graph=True): use passes="loop"')


# The names of the nodes that stand in the graph of a loss whose gradients come from a split backward.
NODES = tuple(f"{function.__name__}Backward" for function in (GivenGradients, KnownGradient))
