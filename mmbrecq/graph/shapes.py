"""Runs modules on shapes alone, as tensors on the device ``meta``: that takes no memory and hardly any time."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from mmbrecq.errors import GraphError, first_line
from mmbrecq.graph.symbolic import tensors_in


def state_on(module: nn.Module, device: torch.device | str) -> dict[str, Tensor]:
    """Returns parameters and buffers by path, without gradients; on their own device they share its memory.

    Each attribute of a module is there once: one that is named twice, since its module has two paths, would be
    exchanged twice by torch, and not be given back.
    """
    state: dict[str, Tensor] = {}
    moved: dict[int, Tensor] = {}
    for path, owner in module.named_modules():
        for name, tensor in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False)):
            state[f'{path}.{name}'.removeprefix('.')] = moved.setdefault(id(tensor), tensor.detach().to(device))
    return state


def call_with(module: nn.Module, state: dict[str, Tensor], *inputs: Tensor) -> Any:
    """Returns what a module computes with another state, see :func:`state_on`."""
    return functional_call(module, state, inputs, tie_weights=False)


def shapes_of(value: Any) -> Any:
    """Returns a value with tensors on the device ``meta`` in place of its tensors.

    Example:
        >>> shapes_of((torch.ones(2, 3), 5))
        (tensor(..., device='meta', size=(2, 3)), 5)
    """
    if any(True for _ in tensors_in(value)):
        return fx.node.map_aggregate(value, lambda v: v.detach().to('meta') if isinstance(v, Tensor) else v)
    return value


def stand_in(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Returns a tensor on a device, with random values in [0, 1) or zeros in place of those that are not known."""
    if tensor.device.type != 'meta' or torch.device(device).type == 'meta':
        return tensor.detach().to(device)
    return (torch.rand_like if tensor.is_floating_point() else torch.zeros_like)(tensor, device=device)


def note_shapes(model: nn.Module, graph: fx.Graph, images: Tensor) -> None:
    """Replaces ``meta['example']`` of the nodes that compute by the shapes of their values for ``images``.

    GraphError is raised if the graph does not run on them.
    """
    module = _Noting(model, graph)
    for device in ('meta', images.device):
        # some operations have no form that computes shapes
        try:
            with torch.no_grad():
                call_with(module, state_on(module, device), images.to(device))
            return
        except Exception as error:
            reason = first_line(error)
    shape = ' x '.join(map(str, images.shape))
    raise GraphError(f'the graph of {type(model).__name__} does not run on images of {shape}: {reason}')


class _Noting(nn.Module):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, images: Tensor) -> None:
        _Interpreter(self.model, graph=self.graph).run(images)


class _Interpreter(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op in ('call_function', 'call_method', 'call_module'):
            n.meta['example'] = shapes_of(value)
        return value
