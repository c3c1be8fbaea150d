"""Merges the branches of modules that have a merged form for deployment (RepVGG, MobileOne, RepLKNet and others).

Branches that are quantized one by one would be as many layers at run time; merged first, they are one layer.
"""

import inspect
from copy import deepcopy

import torch
from torch import Tensor, nn

from mmbrecq.errors import GraphError, first_line
from mmbrecq.graph.components import ImageForward
from mmbrecq.graph.equality import unexplained_error
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.tracer import WEIGHTED

IN_PLACE = ('switch_to_deploy', 'merge_kernel', 'reparameterize')
"""Methods without arguments by which OpenMMLab's and timm's modules merge their branches; the first one is called."""

REPLACING = 'fuse'
"""A method of timm's that returns a module to replace its owner with, or merges in place; often only a BatchNorm."""


def merge_branches(model: nn.Module, example: Tensor) -> list[str]:
    """Merges the branches of all modules of ``model`` that have a method for it, and compares the outputs.

    The model is put into evaluation mode; a merged module stays as it is. ``example`` is ``(N, 3, H, W)``. Returns the
    paths of the modules whose parameters became others; GraphError is raised if a module cannot be merged, or an output
    changes by more than 1e-5 of its variance.
    """
    model.eval()
    if not any(_merging_method(module) for module in model.modules()):
        return []
    with torch.no_grad():
        before = flatten_outputs(ImageForward(model)(example))
        merged = _merge(model, '')
        after = flatten_outputs(ImageForward(model)(example)) if merged else before
    difference = unexplained_error(ImageForward(model), example, after, before, 'they change by {} of their variance')
    if merged and difference:
        raise _refusal(merged[0], difference)
    return merged


def _merge(module: nn.Module, path: str) -> list[str]:
    """Merges the modules below ``module``, outermost first: they merge what they own."""
    merged = []
    method = _merging_method(module)
    if method in IN_PLACE:
        names = set(module.state_dict())
        try:
            getattr(module, method)()
        except Exception as error:
            raise _refusal(path, f'{method}() raised {first_line(error)}') from error
        merged = [path] if names != set(module.state_dict()) else []
    for name, child in list(module.named_children()):
        fused = _fuse(child)
        below = f'{path}.{name}' if path else name
        if fused is None:
            merged += _merge(child, below)
        else:
            setattr(module, name, fused)
            merged.append(below)
    return merged


def _fuse(module: nn.Module) -> nn.Module | None:
    """Returns the fused form of ``module`` if that has fewer layers; BatchNorms are folded in the graph instead."""
    if _merging_method(module) != REPLACING:
        return None
    fused = deepcopy(module)
    try:
        result = fused.fuse()  # type: ignore[operator]
    except Exception:
        # what it would have fused runs as well unfused
        return None
    fused = result if isinstance(result, nn.Module) else fused
    return fused if _count_layers(fused) < _count_layers(module) else None


def _count_layers(module: nn.Module) -> int:
    return sum(isinstance(m, WEIGHTED) for m in module.modules())


def _merging_method(module: nn.Module) -> str:
    """Returns the name of the method that merges the branches of ``module``; empty if there is none."""
    for name in (*IN_PLACE, REPLACING):
        method = getattr(module, name, None)
        if inspect.ismethod(method) and not inspect.signature(method).parameters:
            return name
    return ''


def _refusal(path: str, reason: str) -> GraphError:
    return GraphError(
        f'expected the branches of {path or "the model"} to merge without a change of the outputs, but {reason}; '
        'quantizer.merge_branches=False quantizes the branches one by one'
    )
