"""Symbolic tracing with example values at hand.

``torch.fx`` stops where Python asks a proxy for its truth, length or integer value. This tracer runs every recorded
operation on an example and answers from that, so tests on shapes resolve; the operations themselves stay symbolic.
A module that cannot be traced all the same is recorded as one opaque call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mmbrecq.errors import GraphError, first_line
from mmbrecq.graph.attention import attend
from mmbrecq.graph.components import components_of

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
"""Modules whose weights are quantized; subclasses count."""

ACTIVATION_NAMES = ('Swish', 'HSwish', 'HSigmoid', 'Clamp', 'LayerNorm2d')
"""mmcv's and mmpretrain's own leaf modules that ``torch.nn`` has no class for."""


class ConcreteProxy(fx.Proxy):
    """A proxy that knows the value it had for the example input."""

    @property
    def example(self) -> Any:
        """Value of this node for the example input."""
        return self.node.meta['example']

    def __getattr__(self, name: str) -> Any:
        return ConcreteAttribute(self, name)

    def __len__(self) -> int:
        return len(self.example)

    def __int__(self) -> int:
        return int(self.example)

    def __float__(self) -> float:
        return float(self.example)

    def __index__(self) -> int:
        return operator.index(self.example)


class ConcreteAttribute(ConcreteProxy):
    """An attribute of a proxy; a method call when called, else a node of its own."""

    def __init__(self, root: ConcreteProxy, attr: str) -> None:
        # the node is made on first use, so that x.view(...) records one call and no getattr
        self.root, self.attr = root, attr
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.create_proxy('call_function', getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy('call_method', self.attr, (self.root, *args), kwargs)


class ConcreteTracer(fx.Tracer):
    """Traces the arithmetic of an OpenMMLab model without its pre- and post-processing.

    Every node gets ``meta['example']``, its value for ``example``, and ``meta['owner']``, the dotted path of the
    module whose ``forward`` made it. The call of a module gets ``meta['layers']``, the paths of the convolutions and
    linear layers that it ran.

    Args:
        example (Tensor): The input, preprocessed images ``(N, 3, H, W)`` for one.
        computing: Paths of convolutions and linear layers that compute something else than their class does.
    """

    def __init__(self, example: Tensor, computing: Collection[str] = ()) -> None:
        super().__init__()
        self.example, self.computing = example, computing
        self.opaque: dict[str, str] = {}
        self._owners: list[str] = ['']
        self._evaluating = False

    def trace_model(self, model: nn.Module, entry: nn.Module) -> fx.Graph:
        """Returns the graph of ``entry``, whose module targets are paths below ``model``.

        Args:
            model: Owner of all modules.
            entry: Computes with them; its one attribute that is a module, ``model``, is theirs.
        """
        self._model = model
        with torch.no_grad(), self._recording(components_of(model)):
            return self.trace(entry)

    @contextmanager
    def _recording(self, components: list[nn.Module]) -> Iterator[None]:
        """Makes ``component.forward(x)``, which mmdet's detectors write, the recorded call that ``component(x)`` is."""
        before = [vars(component).get('forward') for component in components]
        for component in components:
            object.__setattr__(component, 'forward', self._recorded(component))
        try:
            yield
        finally:
            for component, forward in zip(components, before, strict=True):
                if forward is None:
                    del component.forward
                else:
                    object.__setattr__(component, 'forward', forward)

    def _recorded(self, component: nn.Module) -> Callable[..., Any]:
        forward = component.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            is_entered = self._evaluating or self._owners[-1] == self.path_of_module(component)
            return forward(*args, **kwargs) if is_entered else component(*args, **kwargs)

        return call

    def path_of_module(self, mod: nn.Module) -> str:
        return super().path_of_module(mod).removeprefix('model').removeprefix('.')

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, WEIGHTED):
            return module_qualified_name not in self.computing
        if type(m).__name__ in ACTIVATION_NAMES:
            return True
        # a transformer of torch has layers of its own
        return m.__module__.startswith('torch.nn') and not any(True for _ in m.children())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._evaluating or m is self._model:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        last = list(self.graph.nodes)[-1]
        self._owners.append(path)
        try:
            if self.is_leaf_module(m, path):
                return self.create_proxy('call_module', path, args, kwargs)
            return attend(m, *args, **kwargs) if type(m) is nn.MultiheadAttention else forward(*args, **kwargs)
        except Exception as error:
            if any(not isinstance(v, (Tensor, fx.Proxy)) for v in _leaves((args, kwargs))):
                raise
            _erase_after(self.graph, last)
            self.opaque[path] = f'{type(m).__name__} cannot be traced: {first_line(error)}'
            return _unpacked(self.create_proxy('call_module', path, args, kwargs))
        finally:
            self._owners.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Node:
        if kind == 'get_attr':
            target = self._adopt_attribute(target)
        node = super().create_node(kind, target, *rest, **more)
        node.meta['owner'] = self._owners[-1]
        # torch.fx patches every module call while it traces; the ones made here are not to be recorded
        self._evaluating = True
        try:
            node.meta['example'] = self._evaluate(node)
        finally:
            self._evaluating = False
        return node

    def _adopt_attribute(self, target: str) -> str:
        """Path below the model of an attribute below the traced root; constants met on the way become buffers."""
        if target.startswith('model.'):
            return target.removeprefix('model.')
        if not hasattr(self._model, target):
            self._model.register_buffer(target, getattr(self.root, target), persistent=False)
        return target

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == 'placeholder':
            return self.example
        if node.op == 'output':
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta['example'])
        if node.op == 'get_attr':
            return operator.attrgetter(str(node.target))(self._model)
        if node.op == 'call_module':
            with self._noting_layers(node):
                return self._model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == 'call_method':
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    @contextmanager
    def _noting_layers(self, node: fx.Node) -> Iterator[None]:
        """Notes which layers the call runs: an opaque module may own some that it does not."""
        target, called = str(node.target), node.meta.setdefault('layers', [])
        layers = [
            (name, module)
            for name, module in self._model.get_submodule(target).named_modules(prefix=target)
            if isinstance(module, WEIGHTED) and name not in self.computing
        ]
        hooks = [m.register_forward_pre_hook(partial(_note, called, name)) for name, m in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def proxy(self, node: fx.Node) -> ConcreteProxy:
        return ConcreteProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(obj.node.meta['example'])

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        assert isinstance(obj, ConcreteProxy)
        return iter([operator.getitem(obj, i) for i in range(len(obj))])

    def keys(self, obj: fx.Proxy) -> Any:
        raise GraphError('expected keyword arguments with known names, but got a traced value to unpack')


def _note(called: list[str], name: str, *call: Any) -> None:
    if name not in called:
        called.append(name)


def _unpacked(value: ConcreteProxy) -> Any:
    """The tensors of nested sequences each as a node: only tensors cross from unit to unit."""
    if not isinstance(value.example, (list, tuple)):
        return value
    items = [_unpacked(operator.getitem(value, i)) for i in range(len(value))]
    return items if isinstance(value.example, list) else tuple(items)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _leaves(item)
    elif tree is not None and not isinstance(tree, (bool, int, float, str)):
        yield tree


def _erase_after(graph: fx.Graph, last: fx.Node) -> None:
    nodes = list(graph.nodes)
    for node in reversed(nodes[nodes.index(last) + 1 :]):
        graph.erase_node(node)
