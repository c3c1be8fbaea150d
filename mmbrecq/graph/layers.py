"""Plain convolutions and linear layers in the place of whatever computes one with a constant weight."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from mmbrecq.graph.modules import replace_module
from mmbrecq.graph.tracer import WEIGHTED

_CONV = ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups')
_TRANSPOSED = ('input', 'weight', 'bias', 'stride', 'padding', 'output_padding', 'groups', 'dilation')
_FUNCTIONS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, ('input', 'weight', 'bias')),
    F.conv1d: (nn.Conv1d, _CONV), F.conv2d: (nn.Conv2d, _CONV), F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED), F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
}  # fmt: skip
_PRODUCTS = (torch.matmul, torch.mm, operator.matmul, 'matmul', 'mm')
_FORWARDS = {kind.forward for kind in WEIGHTED}


def bake_weights(model: nn.Module, run: Callable[[], Any]) -> frozenset[str]:
    """Replaces every layer that computes its weight from constants alone by a plain layer with that weight.

    Weight standardisation, spectral and weight normalisation, parametrizations.

    Args:
        model: Changed in place.
        run: Runs it.

    Returns:
        Paths of the layers that compute something else than a plain layer, and are not to be taken for one.
    """
    odd = {path: module for path, module in model.named_modules() if isinstance(module, WEIGHTED) and _is_odd(module)}
    inputs: dict[str, tuple[Any, ...]] = {}
    hooks = [m.register_forward_pre_hook(partial(_note_input, inputs, path)) for path, m in odd.items()]
    try:
        if odd:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    computing = set()
    for path, values in inputs.items():
        baked = _plain_layer(odd[path], *values)
        if baked is None:
            computing.add(path)
        elif baked is not odd[path]:
            replace_module(model, path, baked)
    return frozenset(computing)


def _is_odd(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    plain = type(module).forward in _FORWARDS and 'forward' not in vars(module)
    return not plain or 'weight' not in own or (module.bias is not None and 'bias' not in own)


def _note_input(inputs: dict[str, tuple[Any, ...]], path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    inputs.setdefault(path, args)


class _Calls(TorchFunctionMode):
    """Lists the calls of convolutions and linear layers: the function, its arguments by name, its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FUNCTIONS:
            self.calls.append((func, _named(func, args, kwargs or {}), result))
        return result


def _plain_layer(module: Any, *inputs: Any) -> nn.Module | None:
    """The module itself where its own weight is applied as it is, a plain layer, or None where none does the same."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return None
    seen = []
    for x in (inputs[0], inputs[0].roll(1, -1) * 0.5 + 0.1):
        with torch.no_grad(), _Calls() as calls:
            result = module(x)
        if len(calls.calls) != 1 or calls.calls[0][2] is not result:
            return None
        seen.append((calls.calls[0][0], calls.calls[0][1], x))
    function, options, x = seen[0]
    if options['weight'] is module.weight and options.get('bias') is module.bias:
        return module  # type: ignore[no-any-return]
    others = seen[1][1]
    same = all(torch.equal(options[n], others[n]) for n in ('weight', 'bias') if options.get(n) is not None)
    return _make_layer(function, options) if same and options['input'] is x else None


def _named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_FUNCTIONS[function][1], args, strict=False)), **kwargs}


def _make_layer(function: Any, options: Mapping[str, Any]) -> nn.Module:
    kind, names = _FUNCTIONS[function]
    weight, bias = options['weight'].detach(), options.get('bias')
    groups = options.get('groups', 1)
    sizes = [weight.shape[1] * groups, weight.shape[0]]
    if names is _TRANSPOSED:
        sizes = sizes[::-1]
    more = {name: options[name] for name in names[3:] if name in options}
    shape = [] if kind is nn.Linear else [tuple(weight.shape[2:])]
    layer: Any = nn.utils.skip_init(kind, *sizes, *shape, bias=bias is not None, **more)
    layer.weight = nn.Parameter(weight.clone().contiguous())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer.eval()  # type: ignore[no-any-return]


def make_layers(model: nn.Module, graph: fx.Graph) -> None:
    """Turns calls of ``F.linear``, ``F.conv2d`` and the like on constant weights into calls of layers.

    A layer takes the place of the module that owns the weight where that is called nowhere; else it lies below the
    module whose ``forward`` makes the call, under the name of the node.

    Args:
        model: Gets the layers.
        graph: Changed in place.
    """
    made: dict[Any, str] = {}
    for node in list(graph.nodes):
        if node.op not in ('call_function', 'call_method'):
            continue
        function, options = _call_of(node)
        if function is None or not isinstance(options['input'], fx.Node) or _is_constant(options['input']):
            continue
        if not all(_is_constant(value) for name, value in options.items() if name != 'input'):
            continue
        key = (function, *((name, value) for name, value in options.items() if name != 'input'))
        values = {name: v.meta['example'] if isinstance(v, fx.Node) else v for name, v in options.items()}
        if node.target in _PRODUCTS:
            values['weight'] = values['weight'].t()
        if key not in made:
            made[key] = _path(model, graph, node, options['weight'])
            replace_module(model, made[key], _make_layer(function, values))
        with graph.inserting_before(node):
            call = graph.call_module(made[key], (options['input'],))
        call.meta.update(owner=made[key], example=node.meta['example'], layers=[made[key]])
        node.replace_all_uses_with(call)
        unused = [node]
        while unused:
            dead = unused.pop()
            if not dead.users:
                unused += [n for n in dead.all_input_nodes if n is not call and _is_constant(n)]
                graph.erase_node(dead)


def _call_of(node: fx.Node) -> tuple[Any, dict[str, Any]]:
    """The function of a layer that ``node`` calls, None for another, and its arguments by name."""
    if node.target in _FUNCTIONS:
        return node.target, _named(node.target, node.args, node.kwargs)
    if node.target in _PRODUCTS and len(node.args) == 2 and isinstance(node.args[1], fx.Node):
        weight = node.args[1].meta['example']
        if isinstance(weight, Tensor) and weight.dim() == 2:
            return F.linear, {'input': node.args[0], 'weight': node.args[1]}
    return None, {}


def _is_constant(value: Any) -> bool:
    """Whether no input has a part in the value."""
    if not isinstance(value, fx.Node):
        return True
    seen, stack = set(), [value]
    while stack:
        node = stack.pop()
        if node.op in ('placeholder', 'call_module'):
            return False
        stack += [n for n in node.all_input_nodes if n not in seen]
        seen.add(node)
    return True


def _path(model: nn.Module, graph: fx.Graph, node: fx.Node, weight: fx.Node) -> str:
    """Where the layer goes: to the owner of the weight if that is a plain layer without another use, else beside it."""
    owner, _, name = str(weight.target).rpartition('.') if weight.op == 'get_attr' else ('', '', '')
    module = model.get_submodule(owner)
    if name == 'weight' and isinstance(module, WEIGHTED) and not _is_odd(module):
        read = [n for n in graph.nodes if n.op == 'get_attr' and str(n.target).rpartition('.')[0] == owner]
        called = {path for n in graph.nodes for path in n.meta.get('layers', ())}
        if owner not in called and all(set(n.users) == {node} for n in read):
            return owner
    return '.'.join(filter(None, (node.meta['owner'], f'{node.name}_layer')))
