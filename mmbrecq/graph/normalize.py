"""Rewrites that make a traced graph safe to cut and to quantize, without moving its result."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from mmbrecq.graph.tracer import WEIGHTED

_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


def make_out_of_place(model: nn.Module, graph: fx.Graph) -> None:
    """Replaces in-place operations: a unit must not overwrite the cached output of another.

    Args:
        model: Owner of the modules that the graph calls.
        graph: Changed in place.
    """
    for node in graph.nodes:
        if node.op == 'call_module':
            for module in model.get_submodule(str(node.target)).modules():
                if hasattr(module, 'inplace'):
                    setattr(module, 'inplace', False)  # noqa: B010 - no common base declares it
        elif node.op == 'call_function':
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
            if 'inplace' in node.kwargs:
                node.kwargs = {**node.kwargs, 'inplace': False}
        elif node.op == 'call_method' and str(node.target).endswith('_') and not str(node.target).endswith('__'):
            node.target = str(node.target)[:-1]


def drop_identities(model: nn.Module, graph: fx.Graph) -> None:
    """Removes what does nothing in evaluation: identities, dropout, stochastic depth."""
    names = ('Dropout', 'Dropout2d', 'Identity', 'DropPath')
    for node in list(graph.nodes):
        if node.op == 'call_module' and type(model.get_submodule(str(node.target))).__name__ in names:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def fold_batch_norms(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Folds every BatchNorm that follows a convolution or linear layer into it, with running statistics.

    ``w' = w * gamma / sqrt(var + eps)``, ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``. The BatchNorm is
    replaced by an identity in ``model`` and its node erased.

    Returns:
        Paths of the layers that took a BatchNorm in.
    """
    folded = []
    calls = _calls_per_module(graph)
    for node in list(graph.nodes):
        if node.op != 'call_module' or not isinstance(node.args[0] if node.args else None, fx.Node):
            continue
        norm, source = model.get_submodule(str(node.target)), node.args[0]
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
            continue
        if source.op != 'call_module' or len(source.users) > 1:
            continue
        layer = model.get_submodule(str(source.target))
        if not isinstance(layer, WEIGHTED) or calls[str(source.target)] > 1 or calls[str(node.target)] > 1:
            continue
        _fold(layer, norm)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        _replace_module(model, str(node.target), nn.Identity())
        folded.append(str(source.target))
    return folded


def _fold(layer: Any, norm: nn.modules.batchnorm._BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        # in float64, so that folding costs no more than the last rounding
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.affine:
            factor = factor * norm.weight.double()
        bias = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
        bias = bias * factor + (norm.bias.double() if norm.affine else 0)
        weight = layer.weight.double()
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            groups = weight.reshape(layer.groups, -1, *weight.shape[1:])
            shape = (layer.groups, 1, -1) + (1,) * (weight.dim() - 2)
            weight = (groups * factor.reshape(shape)).reshape(weight.shape)
        else:
            weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
        dtype = layer.weight.dtype
        layer.weight.copy_(weight.to(dtype))
        layer.bias = nn.Parameter(bias.to(dtype))


def _calls_per_module(graph: fx.Graph) -> dict[str, int]:
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == 'call_module':
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    return calls


def _replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)
