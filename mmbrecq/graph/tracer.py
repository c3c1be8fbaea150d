"""Symbolic tracing with example values at hand.

``torch.fx`` stops where Python asks a proxy for its truth, length or integer value. This tracer runs every recorded
operation on an example and answers from that, but only what follows from sizes: a number or a branch that follows from
the values of a tensor is refused. A module that cannot be traced is recorded as one opaque call.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from mmbrecq.errors import GraphError
from mmbrecq.graph import symbolic
from mmbrecq.graph.attention import attend, computing_in_torch, local_response_norm, spaced, unfold
from mmbrecq.graph.components import components_of, pre_hooks
from mmbrecq.graph.units import is_below

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHTED = (*CONVOLUTIONS, nn.Linear)
"""Modules whose weights are quantized; subclasses count."""

ACTIVATION_NAMES = ('Swish', 'HSwish', 'HSigmoid', 'Clamp')
"""Activation functions of mmcv; they are recorded as one call, as those of ``torch.nn`` are."""

_INITIALISED: dict[Any, Any] = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, 'new_empty': 'new_zeros'}
"""Functions whose results hold what lay in memory, which would count as values until they are overwritten."""

_SHAPED_AS = {'reshape_as': 'reshape', 'view_as': 'view', 'expand_as': 'expand'}
"""Methods that read nothing of their argument but its shape."""

_WRITES = ('__setitem__', *(f'__{function.__name__}__' for function in symbolic.IN_PLACE_OPERATORS))


class UntraceableError(GraphError):
    """Raised when the calls of one module have no graph that is right for all inputs.

    Args:
        owner: Path of the module; empty where it is the model.
        reason: The obstacle.
        by_size: Whether its calls follow from the batch size.
    """

    def __init__(self, owner: str, reason: str, by_size: bool = False) -> None:
        super().__init__(reason)
        self.owner, self.by_size = owner, by_size


class ConcreteTracer(fx.Tracer):
    """Traces the arithmetic of a model without its pre- and post-processing.

    The ``meta`` of every node has ``example``, its value for ``example``; ``owner``, the dotted path of the module
    whose ``forward`` made it; ``depends``, see :func:`dependence`; ``writes``, the nodes whose tensors the operation
    overwrote; and ``view``, the input in whose memory the result lies. The call of a module has ``layers``, the paths
    of the convolutions and linear layers that it ran.

    Args:
        example (Tensor): The input, such as preprocessed images ``(N, 3, H, W)``.
        forced: Paths of modules to be recorded as one call, each with the reason.
        computing: Paths of convolutions and linear layers that compute something else than their class does.

    Attributes:
        opaque: Paths of the modules that are one call of the graph, each with the reason.
        value_dependent: Paths of the opaque modules whose Python reads values of tensors.
        constants: Tensors that the graph reads and the model does not have.
        restore: Makes of the outputs of the graph what the model itself returns.
        sizes: Values of the nodes that follow from sizes alone, where all others are forgotten.
    """

    def __init__(
        self, example: Tensor, forced: Mapping[str, str] | None = None, computing: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.example = example.clone()
        self.forced, self.computing = dict(forced or {}), computing
        self.opaque: dict[str, str] = {}
        self.value_dependent: set[str] = set()
        self.constants: dict[str, Tensor] = {}
        self.restore: Callable[[Any], Any] = lambda outputs: outputs
        self.sizes: dict[fx.Node, Any] | None = None
        self._owners: list[str] = ['']
        self._attributes: dict[str, Any] = {}
        self.is_evaluating = False

    def trace_model(self, model: nn.Module, entry: nn.Module) -> fx.Graph:
        """Returns the graph of ``entry``, a module that computes with those of its attribute ``model``.

        Targets are paths below ``model``; UntraceableError is raised if the model changes its own state.
        """
        self._model = model
        with (
            torch.inference_mode(False), torch.no_grad(), _same_state(model, entry), _SymbolicSizes(self),
            symbolic.seen_as_tensors(), computing_in_torch(), _entering_functions(),
        ):  # fmt: skip
            for component in components_of(model):
                object.__setattr__(component, 'forward', self._recorded(component))
            graph = self.trace(entry)
            self.restore = vars(entry).get('restore', self.restore)
        for node in graph.nodes:
            # a function of torch.fx.wrap that is traced through makes no call that generated code would have to wrap
            node.meta.pop('is_wrapped', None)
        return graph

    def _recorded(self, component: nn.Module) -> Callable[..., Any]:
        """Returns a ``forward`` whose call, which mmdet's detectors write, is recorded as ``component(x)`` is."""
        forward = component.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            is_entered = self.is_evaluating or self._owners[-1] == self.path_of_module(component)
            return forward(*args, **kwargs) if is_entered else component(*args, **kwargs)

        return call

    def path_of_module(self, mod: nn.Module) -> str:
        return super().path_of_module(mod).removeprefix('model').removeprefix('.')

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, WEIGHTED):
            return module_qualified_name not in self.computing
        if isinstance(m, nn.LocalResponseNorm) or 'forward' in vars(m):
            return False
        if type(m).__name__ in (*ACTIVATION_NAMES, 'LayerNorm2d'):
            return True
        # a transformer of torch has layers of its own, and an empty sequence is no operation
        is_single = not isinstance(m, nn.Sequential) and not any(True for _ in m.children())
        return is_single and m.__module__.startswith('torch.nn')

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_evaluating or m is self._model:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            # made within a forward pass, as `nn.ReLU()(x)` or a slice of layers
            return forward(*args, **kwargs)
        count = len(self.graph.nodes)
        self._owners.append(path)
        try:
            if path in self.forced:
                raise GraphError(self.forced[path])
            if self.is_leaf_module(m, path):
                if not isinstance(m, WEIGHTED) and not is_below(path, self._owners[-2]):
                    # an activation that several modules share, each calls for itself
                    self._owners[-1] = self._owners[-2]
                return self.create_proxy('call_module', path, *_positional(m, args, kwargs))
            return attend(m, *args, **kwargs) if type(m) is nn.MultiheadAttention else forward(*args, **kwargs)
        except Exception as error:
            if isinstance(error, UntraceableError) or any(
                not isinstance(v, (Tensor, fx.Proxy, bool, int, float, str)) for v in symbolic.flat((args, kwargs))
            ):
                raise
            if isinstance(m, WEIGHTED):
                # one that is not called as its class is has no grid to be quantized on
                raise UntraceableError('', f'{path}: {symbolic.obstacle(error)}') from error
            for node in reversed(list(self.graph.nodes)[count:]):
                self.graph.erase_node(node)
            self.opaque = {p: why for p, why in self.opaque.items() if not is_below(p, path)}
            self.opaque[path] = f'{type(m).__name__} cannot be traced: {symbolic.obstacle(error)}'
            if isinstance(error, symbolic.ValueDependentError):
                self.value_dependent.add(path)
            return _unpacked(self.create_proxy('call_module', path, *_positional(m, args, kwargs)))
        finally:
            self._owners.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, fx.Node):
            return a
        if isinstance(a, nn.Parameter) and all(a is not own for own in self.root.parameters()):
            where = symbolic.caller()
            raise UntraceableError('', f'{where}: expected parameters of the model, but one is of a module in a list, '
                                   'which nn.ModuleList would register, or in a closure')  # fmt: skip
        return a.node if symbolic.is_symbolic(a) else super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        if kind == 'call_function' and isinstance(target, FunctionType) and not target.__module__.startswith('torch.'):
            # torch.fx.wrap makes one call of it: the layers within would stay in float
            return target(*args, **kwargs)
        if kind == 'call_function' and not args and 'input' in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop('input'),)
        if target is F.local_response_norm:
            return local_response_norm(*args, **kwargs)
        if kind == 'call_method' and target == 'unfold' and not kwargs:
            return unfold(*args)
        if target is torch.linspace and len(args) == 3 and kwargs.keys() <= {'dtype', 'device'}:
            return spaced(*args, **kwargs)
        if kind == 'call_method' and target in _SHAPED_AS and len(args) == 2:
            target, args = _SHAPED_AS[target], (args[0], args[1].shape)
        target = _INITIALISED.get(target, target) if kind in ('call_function', 'call_method') else target
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def create_node(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Node:
        if kind == 'get_attr':
            target = target.removeprefix('model.')
        node = super().create_node(kind, target, *rest, **more)
        node.meta.update(owner=self._owners[-1], caller=self._owners[-2:][0], line=symbolic.caller())
        # torch.fx patches every module call while it traces; the ones made here are not to be recorded
        self.is_evaluating = True
        try:
            # a model may enter the mode in its own code, which keeps no count of what is overwritten
            with torch.inference_mode(False), torch.no_grad():
                self._evaluate(node)
        finally:
            self.is_evaluating = False
        return node

    def _evaluate(self, node: fx.Node) -> None:
        inputs = [(n, t, t._version) for n in node.all_input_nodes for t in symbolic.tensors_in(n.meta['example'])]
        result = self._result(node)
        node.meta['example'] = result
        node.meta['writes'] = list(dict.fromkeys(n for n, t, version in inputs if t._version != version))
        node.meta['view'] = next((n for n, t, _ in inputs if symbolic.shares_memory(t, result)), None)
        node.meta['depends'] = set() if str(node.target) in self.constants else symbolic.dependence(node)
        for written in node.meta['writes']:
            tensors = list(symbolic.tensors_in(written.meta['example']))
            for other in node.graph.nodes:
                if any(symbolic.shares_memory(t, other.meta.get('example')) for t in tensors):
                    other.meta['depends'] |= node.meta['depends']

    def _result(self, node: fx.Node) -> Any:
        if node.op == 'placeholder':
            return self.example
        if node.op == 'output':
            return None
        if node.op == 'get_attr':
            return self._attribute(str(node.target))
        if node.op != 'call_module':
            return symbolic.evaluate(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), symbolic.example_of)
        path, module = str(node.target), self._model.get_submodule(str(node.target))
        # an opaque module may own layers that it does not run
        layers = {
            name: layer
            for name, layer in module.named_modules(prefix=path)
            if isinstance(layer, WEIGHTED) and name not in self.computing
        }
        has_hooks = any(vars(module)[kind] for kind in ('_forward_hooks', '_forward_pre_hooks'))
        unchanged = deepcopy((args, kwargs)) if has_hooks and path not in self.opaque else None
        called: dict[str, None] = {}
        watch = symbolic.WatchedValues(list(symbolic.tensors_in((args, kwargs))))
        with (
            pre_hooks(layers, lambda name, _: called.setdefault(name)),
            watch if path in self.opaque else nullcontext(),
        ):
            result = module(*args, **kwargs)
        node.meta['layers'] = list(called)
        if unchanged and not symbolic.equal(result, module.forward(*unchanged[0], **unchanged[1])):
            raise UntraceableError('', f'expected hooks that only observe, but one of {path} changes what it computes')
        if watch.are_read:
            self.value_dependent.add(path)
        return result

    def _attribute(self, target: str) -> Any:
        """Returns an attribute of the model, or a constant of its code; tensors as copies that may be overwritten."""
        if target not in self._attributes:
            is_constant = hasattr(self.root, target)
            value = getattr(self.root, target) if is_constant else operator.attrgetter(target)(self._model)
            if is_constant and isinstance(value, Tensor):
                self.constants[target] = value.detach().clone()
            self._attributes[target] = value.detach().clone() if isinstance(value, Tensor) else value
        return self._attributes[target]

    def proxy(self, node: fx.Node) -> Any:
        return symbolic.stand_in(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        assert isinstance(obj, symbolic.ConcreteProxy)
        return bool(obj.read('a branch', bool))

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([operator.getitem(obj, i) for i in range(len(obj))])

    def keys(self, obj: fx.Proxy) -> Any:
        raise GraphError('expected keyword arguments with known names, but got a traced value to unpack')


class _SymbolicSizes(TorchFunctionMode):
    """Records what torch computes from constants and sizes of the input alone, without any proxy of a tensor."""

    def __init__(self, tracer: ConcreteTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._tracer.is_evaluating:
            return func(*args, **kwargs)
        name = str(getattr(func, '__name__', ''))
        has_proxy = any(isinstance(value, fx.Proxy) for value in symbolic.flat((args, kwargs)))
        if name in ('tensor', 'as_tensor', 'asarray') and isinstance(args[0], fx.Proxy):
            # compiled code would read the memory of a tensor
            return args[0].to(kwargs.get('dtype', args[0].dtype))
        is_in_place = name.endswith('_') and (not name.startswith('__') or name in _WRITES)
        written = kwargs.get('out', args[0] if args and is_in_place else None)
        if isinstance(written, Tensor) and not isinstance(written, fx.Proxy):
            if has_proxy:
                where = symbolic.caller()
                raise GraphError(f'{where}: expected constants to stay constant, but {name} writes into one')
            return func(*args, **kwargs)
        if has_proxy or not any(map(symbolic.is_symbolic, symbolic.flat((args, kwargs)))):
            return func(*args, **kwargs)
        if name == '__getitem__':
            return self._tracer.create_proxy('call_function', operator.getitem, args, kwargs)
        is_method = is_tensor_method_or_property(func)
        kind, target = ('call_method', name) if is_method else ('call_function', func)
        return self._tracer.create_proxy(kind, target, args, kwargs)


@contextmanager
def _entering_functions() -> Iterator[None]:
    """Makes functions of autograd run their ``forward``, which is Python, without the compiled code around it.

    Such are activation functions with a gradient of their own, and checkpoints of activations.
    """
    base: Any = torch.autograd.Function.__base__

    def apply(cls: Any, *args: Any) -> Any:
        if cls.setup_context is not torch.autograd.Function.setup_context:
            return cls.forward(*args)
        context: Any = FunctionCtx()
        context.needs_input_grad = (False,) * len(args)
        return cls.forward(context, *args)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


@contextmanager
def _same_state(model: nn.Module, entry: nn.Module) -> Iterator[None]:
    """Restores the attributes and the buffers that tracing sets; parameters must not change at all."""
    # buffers and caches that are set lie in dicts
    attributes = [(m, {k: copy(v) if type(v) is dict else v for k, v in vars(m).items()}) for m in entry.modules()]
    state = [(name, t, t._version) for name, t in model.named_parameters()]
    buffers = [(t, t._version, t.clone()) for t in model.buffers()]
    try:
        yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
    for buffer, version, value in buffers:
        if buffer._version != version:
            buffer.copy_(value)
    for name, tensor, version in state:
        if tensor._version != version:
            raise UntraceableError('', f'expected a forward pass that keeps its state, but it changes {name}')


def _positional(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call, by position where they have one."""
    try:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    except TypeError:
        return args, kwargs
    return bound.args[1:], bound.kwargs


def _unpacked(value: Any) -> Any:
    """Returns nested sequences with a node for each tensor: only tensors cross from unit to unit."""
    if not isinstance(value, fx.Proxy) or not isinstance(value.example, (list, tuple)):
        return value
    items = [_unpacked(operator.getitem(value, i)) for i in range(len(value))]
    return items if isinstance(value.example, list) else tuple(items)
