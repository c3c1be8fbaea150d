"""Rewrites a traced graph so that it is safe to cut and to quantize, without a change of its result."""

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from mmbrecq.errors import GraphError
from mmbrecq.graph.layers import replace_module
from mmbrecq.graph.symbolic import bind, called_module, operation
from mmbrecq.graph.tracer import TRANSPOSED, WEIGHTED

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_ROWS = ('flatten', 'reshape', 'view')


def drop_identities(model: nn.Module, graph: fx.Graph) -> None:
    """Removes identities and dropout, which do nothing in evaluation, and values that nothing reads."""
    for node in list(graph.nodes):
        if _is_identity(model, node):
            node.replace_all_uses_with(node.args[0])
    for node in reversed(list(graph.nodes)):
        module = called_module(model, node)
        # a module that holds others may have an effect beside its value
        has_effect = node.op in ('placeholder', 'output') or (module is not None and any(module.children()))
        if not node.users and not has_effect:
            graph.erase_node(node)


def index_squeezes(graph: fx.Graph) -> None:
    """Writes every squeeze as the index of the axes that it drops for the example.

    A squeeze that drops the batch axis of one image, or another axis where a size allows it, needs control flow in a
    file; the comparison with the model tells where an index is another operation.
    """
    for node in graph.nodes:
        if node.op not in ('call_method', 'call_function') or node.target not in ('squeeze', torch.squeeze):
            continue
        shape = node.args[0].meta['example'].shape
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get('dim', range(len(shape)))
        asked = {int(dim) % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)}
        kept = tuple(0 if axis in asked and size == 1 else slice(None) for axis, size in enumerate(shape))
        node.op, node.target, node.args, node.kwargs = 'call_function', operator.getitem, (node.args[0], kept), {}


def read_past_concatenations(graph: fx.Graph) -> None:
    """Makes an index of a concatenation that reaches one of its parts alone an index of this part, or the part itself.

    What a layer reads of the part then follows from that part, and not from all that was concatenated: a class token
    that is normalised and put back, ``cat([norm(x[:, :1]), x[:, 1:]], 1)[:, :1]``, is not on a grid with the other
    tokens. The comparison with the model tells where a part has not the same size for every size of the input.
    """
    for node in graph.nodes:
        while node.target is operator.getitem and operation(node.args[0]) in ('cat', 'stack'):
            parts, axis = _concatenated(node.args[0])
            if isinstance(parts, fx.Node):
                # the parts of what was split
                break
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            if operation(node.args[0]) == 'stack':
                # a list of layers, of which one is read
                if axis == 0 and type(index[0]) is int:
                    node.args = (parts[index[0]], index[1:] or (slice(None),))
                break
            if len(index) <= axis or not all(_is_plain(entry) for entry in index):
                break
            part, entry = _entry_of_a_part(index[axis], [part.meta['example'].shape[axis] for part in parts])
            if part is None:
                break
            node.args = (parts[part], (*index[:axis], entry, *index[axis + 1 :]))


def _concatenated(node: fx.Node) -> tuple[Any, int]:
    """Returns the values that ``torch.cat`` concatenates, or the node that makes all of them, and the axis."""
    given = {**dict(zip(('tensors', 'dim'), node.args, strict=False)), **node.kwargs}
    axis = given.get('dim', given.get('axis', 0))
    return given['tensors'], axis % node.meta['example'].dim()


def _is_plain(entry: Any) -> bool:
    """Returns whether an entry of an index is a number or a slice between numbers, which follow from no other node."""
    numbers = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,)
    return all(number is None or type(number) is int for number in numbers) and entry is not None


def _entry_of_a_part(entry: int | slice, sizes: list[int]) -> tuple[int | None, int | slice]:
    """Returns which part of a concatenation an entry reaches, and the entry that does so in the part alone.

    The part is None where the entry reaches none, or several.
    """
    rows = range(sum(sizes))
    reached = rows[entry] if isinstance(entry, slice) else range(rows[entry], rows[entry] + 1)
    for part, size in enumerate(sizes):
        start, behind = sum(sizes[:part]), sum(sizes[part + 1 :])
        if not reached or reached[0] < start or reached[-1] >= start + size:
            continue
        if isinstance(entry, int):
            return part, entry - start if entry >= 0 else entry + behind
        if reached == range(start, start + size):
            return part, slice(None)
        # what was counted from the end still is, for a part may be of any size
        first, stop = (
            None if n is None or n < 0 <= n + behind else n - start if n >= 0 else n + behind
            for n in (entry.start, entry.stop)
        )
        return part, slice(first, stop, entry.step)
    return None, entry


def _is_identity(model: nn.Module, node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta['example'], Tensor):
        return False
    if node.op == 'call_module':
        return isinstance(called_module(model, node), (nn.Identity, _DropoutNd))
    if node.target is operator.getitem and isinstance(node.args[1], tuple):
        return all(entry == slice(None) for entry in node.args[1])
    # functions that draw random numbers while a model is trained have this argument, and batch_norm
    bound = bind(node)
    is_off = bound is not None and bound.arguments.get('training') is False
    return is_off and torch.equal(node.meta['example'], source.meta['example'])


def fold_batch_norms(model: nn.Module, graph: fx.Graph) -> None:
    """Folds every BatchNorm that follows a convolution or linear layer into it, with running statistics.

    ``w' = w * gamma / sqrt(var + eps)``, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``. The BatchNorm is
    replaced by an identity in ``model`` and its node erased. It stays where it normalises another axis than the output
    channels of the layer, or where one of the two has other users. GraphError is raised if a BatchNorm normalises by
    the statistics of the batch.
    """
    uses = _uses_per_module(graph)
    for node in list(graph.nodes):
        _check_statistics(model, node)
        _write_out_gain(model, node)
        norm = called_module(model, node)
        if not isinstance(norm, _BatchNorm) or type(norm).forward not in _FORWARDS or not node.args:
            continue
        source: Any = node.args[0]
        while _keeps_last_axis(source):
            source = source.args[0]
        if not _has_one_reader(source) or uses[str(source.target)] > 1 or uses[str(node.target)] > 1:
            continue
        layer = called_module(model, source)
        if not isinstance(layer, WEIGHTED) or not _owns_channels(layer, node):
            continue
        _fold(layer, norm)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        replace_module(model, str(node.target), nn.Identity())


def _check_statistics(model: nn.Module, node: fx.Node) -> None:
    norm = called_module(model, node)
    by_batch = isinstance(norm, _BatchNorm) and (norm.running_var is None or norm.training)
    if node.target is F.batch_norm:
        by_batch = bool(node.args[5] if len(node.args) > 5 else node.kwargs.get('training', False))
    if by_batch:
        raise GraphError(
            f"expected the BatchNorm of '{node.meta['owner']}' to have running statistics, but it normalises by those "
            'of the batch, so that what comes out for an image depends on the images beside it'
        )


def _write_out_gain(model: nn.Module, node: fx.Node) -> None:
    """Gives a norm that has no gain a gain of 1: a file asks for one, and knows the number of channels from it."""
    norm = called_module(model, node)
    if isinstance(norm, _NormBase) and norm.weight is None:
        norm.weight = nn.Parameter(torch.ones(norm.num_features, device=node.meta['example'].device))
        norm.bias = nn.Parameter(torch.zeros_like(norm.weight))


def _keeps_last_axis(node: fx.Node) -> bool:
    """Returns whether ``node`` brings tokens, ``(N, L, C)``, to rows ``(N * L, C)`` that nothing else reads."""
    if not _has_one_reader(node) or operation(node) not in _ROWS:
        return False
    rows, tokens = (n.meta['example'] for n in (node, node.all_input_nodes[0]))
    return isinstance(tokens, Tensor) and rows.dim() == 2 < tokens.dim() and rows.shape[1] == tokens.shape[-1]


def _has_one_reader(node: fx.Node) -> bool:
    """Returns whether one node reads the values of ``node``; others may read its shape."""
    return sum(user.op != 'call_function' or user.target is not getattr for user in node.users) == 1


def _owns_channels(layer: Any, norm: fx.Node) -> bool:
    """Returns whether axis 1, which a BatchNorm normalises, is that of the output channels of the layer before it."""
    axes = 2 if isinstance(layer, nn.Linear) else layer.weight.dim()
    return bool(norm.meta['example'].dim() == axes)


def _fold(layer: Any, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        # in float64, so that folding costs no more than the last rounding
        factor = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.double()
        bias = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
        bias = bias * factor + norm.bias.double()
        weight = layer.weight.double()
        if isinstance(layer, TRANSPOSED):
            groups = weight.reshape(layer.groups, -1, *weight.shape[1:])
            shape = (layer.groups, 1, -1) + (1,) * (weight.dim() - 2)
            weight = (groups * factor.reshape(shape)).reshape(weight.shape)
        else:
            weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
        # new ones, for another layer may share the weight
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype))


def _uses_per_module(graph: fx.Graph) -> Counter[str]:
    """Counts how often each module is called, alone or by an opaque one, or has one of its parameters read."""
    uses: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == 'call_module':
            uses.update({str(node.target), *node.meta.get('layers', ())})
        elif node.op == 'get_attr':
            uses[str(node.target).rpartition('.')[0]] += 1
    return uses
