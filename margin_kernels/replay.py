"""A forward pass that can be run again: the same function on other inputs, without a trace in the model.

A forward pass reads more than its input and parameters, and may change what it reads: random numbers, buffers
(spectral norm, counters), attributes of its modules (`self.features = h`). ReplayedModel notes these before the
ordinary forward pass. Every further pass starts from what was noted, so it computes the function that gave the logits,
and leaves everything as the ordinary pass left it.

    read or changed by a forward pass                    in a replay                      afterwards
    random numbers                                       drawn again                      as after one pass
    buffers; attributes that are tensors without         clones of their values before    the ordinary pass's tensors
      gradient                                             the ordinary pass
    other attributes                                     as before the ordinary pass      as after one pass
    lists, dicts, sets, deques in attributes, nested     as before the ordinary pass      as after one pass
    batch norm                                           the caller's business: batchnorm.running_statistics
    forward hooks and pre-hooks of modules               run, except those that only      see one pass
                                                           looked on in the ordinary one
    backward hooks of modules                            silent                           see one backward pass
    parameters, other objects, global variables,         not restored
      global hooks

A hook only looks on if it returned None, changed no tensor that it was given and set no attribute of a module. If the
logits of a replay depend on tensors of the ordinary pass all the same (a hook stored an activation that the model reads
later), all hooks run in all replays. Such a dependence is seen in the autograd graph: it is not seen where the hook
detached what it stored.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from .random_state import RandomState
from .sharding import whole_logits

FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
TENSOR_HOOKS = frozenset({"register_hook", "retain_grad", "register_prehook", "register_multi_grad_hook"})
CONTAINERS = (list, dict, set, deque)
# Attributes that every module has, by which nn.Module works.
INTERNAL = frozenset(vars(nn.Module()))


class ModelState:
    """Buffers and attributes of all modules of a model at one moment; parameters are not among them."""

    def __init__(self, model: nn.Module, values: bool = True, batchnorm: bool = False) -> None:
        """values: False notes which tensors there are and not what they hold.  batchnorm: with the buffers of batch
        norm."""
        modules = list(model.modules())
        buffered = [module for module in modules if batchnorm or not isinstance(module, _BatchNorm)]
        buffers = [vars(module).get("_buffers") for module in buffered]  # no dict: a ScriptModule
        self._buffers = [(own, dict(own)) for own in buffers if own and isinstance(own, dict)]
        self._attributes = [Attributes(vars(module)) for module in modules]
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._clones: dict[int, Tensor] = {}
        for attributes in self._attributes:
            for value in attributes.saved.values():
                _collect(value, self._containers)
                if values:
                    self._clone(value)
        if values:
            for _, saved in self._buffers:
                for value in saved.values():
                    self._clone(value)

    def _clone(self, value: Any) -> None:
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.requires_grad:
            return
        if not is_lazy(value) and id(value) not in self._clones:
            self._clones[id(value)] = value.detach().clone()

    def restore(self, fresh: bool = False) -> None:
        """Puts everything back. fresh: clones of the noted values in the place of tensors, which stay untouched."""
        twins = {key: clone.clone() for key, clone in self._clones.items()} if fresh else {}
        for attributes in self._attributes:
            if attributes.changed() or (twins and attributes.tensors):
                attributes.restore(twins)
        for container, copy in self._containers.values():
            if not _same(container, copy):
                container.clear()
                (container.update if isinstance(container, (dict, set)) else container.extend)(copy)
        for live, saved in self._buffers:
            if twins or not _same(live, saved):
                live.clear()
                live.update({name: twins.get(id(value), value) for name, value in saved.items()})


class Attributes:
    """What stands in the __dict__ of a module beside the names that every module has."""

    def __init__(self, live: dict[str, Any]) -> None:
        self.live, self.size = live, len(live)
        self.saved = {name: value for name, value in live.items() if name not in INTERNAL}
        self.tensors = any(isinstance(value, Tensor) for value in self.saved.values())

    def changed(self) -> bool:
        live = self.live
        return len(live) != self.size or any(live.get(name, live) is not value for name, value in self.saved.items())

    def restore(self, twins: dict[int, Tensor]) -> None:
        """The noted values, or their twins by id."""
        for name in [name for name in self.live if name not in self.saved and name not in INTERNAL]:
            del self.live[name]
        self.live.update({name: twins.get(id(value), value) for name, value in self.saved.items()})


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Inside, forward passes change clones of the buffers, and afterwards buffers and attributes are as before; of an
    nn.Module, else nothing happens."""
    if not isinstance(model, nn.Module):
        yield
        return
    before = ModelState(model, batchnorm=True)
    before.restore(fresh=True)
    try:
        yield
    finally:
        before.restore()


class ReplayedModel:
    """The function that one forward pass model(x) computes.

        replayed = ReplayedModel(model, x)
        logits = replayed.first(x)          the ordinary forward pass
        with replayed.replaying():
            replayed(other)                 the same function; the model is as after the ordinary pass when this ends

    Attributes:
        draws: whether the forward pass draws random numbers
        hooked: whether modules have forward or backward hooks
        graph_hooked: whether hooks may sit on the graph of the ordinary pass, which then must see the backward of the
            loss alone: those that module hooks set, and those of modules whose code names register_hook or retain_grad.
            Python cannot ask the graph.
    """

    def __init__(self, model: nn.Module, x: Any, function: Callable[[Any], Tensor] | None = None) -> None:
        """function: what gives the logits [N,C] of an x, where that is not the model itself."""
        self._function = model if function is None else function
        if any(isinstance(module, torch.jit.ScriptModule) and module.training for module in model.modules()):
            raise ValueError(
                "model must not be a ScriptModule in training mode, whose batch norm and buffers cannot be held while "
                "it runs several times: train the module that was scripted, or call model.eval()"
            )
        self.model = model
        self.dtype = x.dtype if isinstance(x, Tensor) else None
        self.hooked = any(
            vars(module).get(kind) for module in model.modules() for kind in FORWARD_HOOKS + BACKWARD_HOOKS
        )
        kinds: set[Any] = {type(module) for module in model.modules()}
        self.graph_hooked = self.hooked or any(map(_sets_tensor_hooks, kinds))
        self.draws = False
        self._random = RandomState.now(x)
        self._before = ModelState(model)
        self._after: ModelState | None = None
        self._silent: set[int] = set()
        self._taken: list[tuple[dict[str, Any], str, Any]] = []
        self._graph: set[Any] = set()  # of the ordinary pass, while hooks are silent and nothing has proven them so

    def first(self, x: Any) -> Tensor:
        """model(x), the ordinary forward pass, from which replays take what it read and what it left behind."""
        if self.hooked:
            looked_on: dict[int, bool] = {}
            with _watched(self.model, looked_on):
                logits = whole_logits(self._function(x))
            self._silent = {key for key, alone in looked_on.items() if alone}
            if self._silent and isinstance(logits, Tensor):
                self._graph = _inner_nodes(logits)
        else:
            logits = whole_logits(self._function(x))
        self.draws = self._random.changed()
        self._after = ModelState(self.model, values=False)
        return logits

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, forward passes and their recomputation leave no trace; without `first`, the model is afterwards as
        when this object was made, and all forward hooks run."""
        after = self._after or self._before
        self._taken = _silence(self.model, self._silent) if self.hooked else []
        try:
            yield
        finally:
            self._put_hooks_back()
            after.restore()

    def try_out(self, x: Tensor) -> None:
        """Finds `draws` out where `first` was not called: another forward pass, where a module is in training mode."""
        if any(module.training for module in self.model.modules()):
            self._before.restore(fresh=True)
            with torch.no_grad(), self._random.replayed():
                self._function(x)
                self.draws = self._random.changed()

    def __call__(self, x: Tensor) -> Tensor:
        if not self._graph:
            return self._run(x)
        try:
            logits = self._run(x)
        except Exception:  # perhaps an activation of the ordinary pass met those of another batch
            self._let_all_hooks_run()
            return self._run(x)
        if not logits.requires_grad:
            return logits
        if self._graph.isdisjoint(_inner_nodes(logits)):
            self._graph = set()
            return logits
        self._let_all_hooks_run()
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = x if self.dtype is None else x.to(self.dtype)
        self._before.restore(fresh=True)
        if not self.draws:
            return whole_logits(self._function(x))
        with self._random.replayed():
            return whole_logits(self._function(x))

    def _let_all_hooks_run(self) -> None:
        self._put_hooks_back()
        self._graph = set()
        self._taken = _silence(self.model, set())

    def _put_hooks_back(self) -> None:
        for live, kind, hooks in self._taken:
            live[kind] = hooks
        self._taken = []


@cache
def _sets_tensor_hooks(kind: type) -> bool:
    """Whether a method of a class that is not PyTorch's names a function that puts hooks on tensors or nodes."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith("torch.") and base is not object]
    methods = [inspect.unwrap(method) for base in own for method in vars(base).values() if callable(method)]
    return any(TENSOR_HOOKS.intersection(_names(method.__code__)) for method in methods if hasattr(method, "__code__"))


def _names(code: CodeType) -> set[str]:
    """The names that a function uses, functions within it included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _collect(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    """Adds the containers in `value` with a copy of each."""
    if isinstance(value, CONTAINERS) and id(value) not in found:
        copy = dict(value) if isinstance(value, dict) else list(value)
        found[id(value)] = value, copy
        for child in copy.values() if isinstance(copy, dict) else copy:
            _collect(child, found)


def _same(container: Any, copy: Any) -> bool:
    """Whether a container holds the objects of its copy, in their order; parameters are nobody's to put back: FSDP
    changes those of a module in its forward, and the list of them that an LSTM keeps."""
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), copy.items(), strict=True)
        return all(key == other and _one(value, was) for (key, value), (other, was) in pairs)
    return all(map(_one, container, copy))


def _one(value: Any, was: Any) -> bool:
    return value is was or (isinstance(value, nn.Parameter) and isinstance(was, nn.Parameter))


def _silence(model: nn.Module, silent: set[int]) -> list[tuple[dict[str, Any], str, Any]]:
    """Takes the backward hooks and the silent forward hooks from all modules; their own dicts stay as they are and are
    returned, with where they belong."""
    removed = []
    for live in map(vars, model.modules()):
        for kind in (*BACKWARD_HOOKS, *FORWARD_HOOKS):
            hooks = live.get(kind)
            if not hooks or (kind in FORWARD_HOOKS and silent.isdisjoint(hooks)):
                continue
            removed.append((live, kind, hooks))
            run = {} if kind in BACKWARD_HOOKS else {key: hook for key, hook in hooks.items() if key not in silent}
            live[kind] = OrderedDict(run)
    return removed


@contextmanager
def _watched(model: nn.Module, looked_on: dict[int, bool]) -> Iterator[None]:
    """Inside, every forward hook that runs is noted: whether each of its calls only looked on."""
    modules = list(model.modules())
    changed: list[tuple[Any, int, Any, Any]] = []
    for module in modules:
        for kind in FORWARD_HOOKS:
            hooks = vars(module).get(kind) or {}
            for key, hook in list(hooks.items()):
                hooks[key] = watching = partial(_watch, hook, key, modules, looked_on)
                changed.append((hooks, key, hook, watching))
    try:
        yield
    finally:
        for hooks, key, hook, watching in changed:
            if hooks.get(key) is watching:  # a hook may have removed itself
                hooks[key] = hook


def _watch(hook: Callable[..., Any], key: int, modules: list[nn.Module], looked_on: dict[int, bool], *args: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    versions = [tensor._version for tensor in tensors]
    before = [Attributes(vars(module)) for module in modules]
    result = hook(*args)
    alone = result is None and versions == [tensor._version for tensor in tensors]
    alone = alone and not any(attributes.changed() for attributes in before)
    looked_on[key] = looked_on.get(key, True) and alone
    return result


def _inner_nodes(tensor: Tensor) -> set[Any]:
    """The nodes of a tensor's graph, leaves left out."""
    nodes: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes and not node.name().endswith("AccumulateGrad"):
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return nodes
