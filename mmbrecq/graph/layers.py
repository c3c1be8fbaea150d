"""Turns whatever computes a convolution or a linear layer with a constant weight into a plain layer."""

from collections.abc import Callable, Mapping
from itertools import chain, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from mmbrecq.graph.components import pre_hooks
from mmbrecq.graph.symbolic import called_module, operation, sources_of
from mmbrecq.graph.tracer import WEIGHTED

_CONV = ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups')
_TRANSPOSED = ('input', 'weight', 'bias', 'stride', 'padding', 'output_padding', 'groups', 'dilation')
_FUNCTIONS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, ('input', 'weight', 'bias')),
    F.conv1d: (nn.Conv1d, _CONV), F.conv2d: (nn.Conv2d, _CONV), F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED), F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
}  # fmt: skip
PRODUCTS = ('matmul', 'mm', 'addmm', 'bmm', 'baddbmm')
"""A file has these operations as products of matrices."""

_FORWARDS = {kind.forward for kind in WEIGHTED}


def bake_weights(model: nn.Module, run: Callable[[], Any]) -> frozenset[str]:
    """Replaces every layer that computes its weight from constants alone by a plain layer with that weight.

    Such are weight standardisation, spectral and weight normalisation, and parametrizations; ``run`` runs the model
    once. Returns the paths of the layers that compute something else, and must not be treated as plain ones.
    """
    odd = {path: module for path, module in model.named_modules() if isinstance(module, WEIGHTED) and _is_odd(module)}
    inputs: dict[str, tuple[Any, ...]] = {}
    if odd:
        with pre_hooks(odd, inputs.setdefault):
            run()
    computing = set()
    for path, values in inputs.items():
        baked = _plain_layer(odd[path], *values)
        if baked is None:
            computing.add(path)
        elif baked is not odd[path]:
            replace_module(model, path, baked)
    return frozenset(computing)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Sets ``module`` at ``path`` below ``model``."""
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)


def free_name(model: nn.Module, stem: str) -> str:
    """Returns a name for an attribute that ``model`` does not have yet."""
    names = chain([stem], (f'{stem}_{i}' for i in count(1)))
    return next(name for name in names if not hasattr(model, name))


def _is_odd(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    plain = type(module).forward in _FORWARDS and 'forward' not in vars(module)
    return not plain or 'weight' not in own or (module.bias is not None and 'bias' not in own)


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
    """Returns the module itself if it applies its own weight, else a plain layer, or None where none does the same."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return None
    seen = []
    for x in (inputs[0], inputs[0].roll(1, -1) * 0.5 + 0.1):
        with torch.no_grad(), _Calls() as calls:
            result = module(x)
        if len(calls.calls) != 1 or calls.calls[0][2] is not result:
            return None
        read = calls.calls[0][1]['input']
        if read is not x and (read.shape == x.shape or read.shape[:2] != x.shape[:2]):
            # but one that only pads what it reads is a layer
            return None
        seen.append((calls.calls[0][0], calls.calls[0][1], x))
    (function, options, x), (_, others, _) = seen
    if options['weight'] is module.weight and options.get('bias') is module.bias:
        return module  # type: ignore[no-any-return]
    same = all(torch.equal(options[n], others[n]) for n in ('weight', 'bias') if options.get(n) is not None)
    return _make_layer(function, options) if same and options['input'] is x else None


def _named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_FUNCTIONS[function][1], args, strict=False)), **kwargs}


def _make_layer(function: Any, options: Mapping[str, Any]) -> nn.Module:
    kind, names = _FUNCTIONS[function]
    weight, bias = options['weight'].detach(), options.get('bias')
    sizes = [weight.shape[1] * options.get('groups', 1), weight.shape[0]]
    if names is _TRANSPOSED:
        sizes.reverse()
    more = {name: options[name] for name in names[3:] if name in options}
    shape = [] if kind is nn.Linear else [tuple(weight.shape[2:])]
    layer: Any = nn.utils.skip_init(kind, *sizes, *shape, bias=bias is not None, **more)
    layer.weight = nn.Parameter(weight.clone().contiguous())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer.eval()  # type: ignore[no-any-return]


def make_layers(model: nn.Module, graph: fx.Graph) -> None:
    """Turns calls of ``F.linear``, ``F.conv2d`` and the like on constant weights into calls of layers.

    A layer replaces the module that owns the weight where that is called nowhere; else it lies below the module whose
    ``forward`` makes the call, under the name of the node. ``model`` and ``graph`` are changed in place.
    """
    made: dict[Any, str] = {}
    for node in list(graph.nodes):
        if node.op not in ('call_function', 'call_method'):
            continue
        function, options = _call_of(node)
        if function is None or is_constant(options['input']):
            continue
        own = {name: value for name, value in options.items() if name != 'input'}
        if not all(map(is_constant, own.values())):
            continue
        key = (function, *own.items())
        values = {name: v.meta['example'] if isinstance(v, fx.Node) else v for name, v in options.items()}
        if operation(node) in PRODUCTS:
            values['weight'] = values['weight'].t()
        if key not in made:
            made[key] = _path(model, graph, node, options['weight'])
            replace_module(model, made[key], _make_layer(function, values))
        with graph.inserting_before(node):
            call = graph.call_module(made[key], (options['input'],))
        call.meta.update(node.meta, owner=made[key], layers=[made[key]])
        node.replace_all_uses_with(call)
        unused = [node]
        while unused:
            dead = unused.pop()
            if not dead.users:
                unused += [n for n in dead.all_input_nodes if n is not call and is_constant(n)]
                graph.erase_node(dead)


def copy_read_parameters(model: nn.Module, graph: fx.Graph) -> None:
    """Gives every weight or bias of a layer that the graph reads elsewhere a buffer: those of the layer will change."""
    for node in graph.nodes:
        path, _, name = str(node.target).rpartition('.') if node.op == 'get_attr' else ('', '', '')
        if path and isinstance(model.get_submodule(path), WEIGHTED):
            node.target = free_name(model, f'{path}_{name}_read'.replace('.', '_'))
            model.register_buffer(node.target, node.meta['example'].detach().clone())


def fold_constants(model: nn.Module, graph: fx.Graph) -> None:
    """Replaces every call of a layer that no input reaches by its result, a buffer of ``model``.

    Such is the network that computes the position biases of Swin V2 from a table of distances.
    """
    constant = [n for n in graph.nodes if all(source.op not in ('placeholder', 'output') for source in sources_of(n))]
    for node in constant:
        if isinstance(called_module(model, node), WEIGHTED):
            name = free_name(model, f'{node.name}_value')
            model.register_buffer(name, node.meta['example'].detach().clone())
            with graph.inserting_before(node):
                value = graph.get_attr(name)
            value.meta.update(owner=node.meta['owner'], example=node.meta['example'])
            node.replace_all_uses_with(value)
    for node in reversed(constant):
        if not node.users:
            graph.erase_node(node)


def _call_of(node: fx.Node) -> tuple[Any, dict[str, Any]]:
    """Returns the function of a layer that ``node`` calls, None for another, and its arguments by name."""
    if node.target in _FUNCTIONS:
        return node.target, _named(node.target, node.args, node.kwargs)
    if operation(node) in ('matmul', 'mm') and len(node.args) == 2 and isinstance(node.args[1], fx.Node):
        weight = node.args[1].meta['example']
        if isinstance(weight, Tensor) and weight.dim() == 2:
            return F.linear, {'input': node.args[0], 'weight': node.args[1]}
    if operation(node) == 'addmm' and len(node.args) == 3 and not node.kwargs:
        bias = node.args[0]
        if isinstance(bias, fx.Node) and bias.meta['example'].dim() == 1:
            return F.linear, dict(zip(('bias', 'input', 'weight'), node.args, strict=True))
    return None, {}


def is_constant(value: Any) -> bool:
    """Returns whether the value follows from no input."""
    sources = sources_of(value) if isinstance(value, fx.Node) else ()
    return all(node.op not in ('placeholder', 'call_module') for node in sources)


def _path(model: nn.Module, graph: fx.Graph, node: fx.Node, weight: fx.Node) -> str:
    """Returns the path of a new layer: that of the weight's owner if it is plain and has no other use, else its own."""
    owner, _, name = str(weight.target).rpartition('.') if weight.op == 'get_attr' else ('', '', '')
    module = model.get_submodule(owner)
    if name == 'weight' and isinstance(module, WEIGHTED) and not _is_odd(module):
        read = [n for n in graph.nodes if n.op == 'get_attr' and str(n.target).rpartition('.')[0] == owner]
        called = {path for n in graph.nodes for path in n.meta.get('layers', ())}
        if owner not in called and all(set(n.users) == {node} for n in read):
            return owner
    return '.'.join(filter(None, (node.meta['owner'], f'{node.name}_layer')))
