"""The arithmetic of an OpenMMLab model as one graph, run in place of its components.

A component (backbone, neck, head) goes on owning its parameters and its ``predict``, ``loss`` and post-processing;
only its ``forward`` is replaced. The first component computes the whole graph, the others hand its result through. So
the same call runs the float graph, the quantized graph or a deployed file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.normalize import drop_identities, fold_batch_norms, make_out_of_place
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.tracer import ConcreteTracer

COMPONENTS = ('backbone', 'neck', 'head', 'bbox_head')
"""Attributes of a model whose ``forward`` is arithmetic, in the order in which they run."""


@dataclass
class Arithmetic:
    """A traced model.

    Args:
        model: Owner of all modules that the graph calls.
        graph: From preprocessed images to raw outputs; every node carries ``meta['example']`` and ``meta['owner']``.
        opaque: Paths of the modules that are one call of the graph, each with the reason.
        folded: Paths of the layers that took a BatchNorm in.
    """

    model: nn.Module
    graph: fx.Graph
    opaque: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)

    def example_outputs(self) -> dict[str, Tensor]:
        """The outputs for the traced images by name, see :mod:`mmbrecq.graph.structure`."""
        output = next(n for n in self.graph.nodes if n.op == 'output')
        return flatten_outputs(fx.node.map_arg(output.args[0], lambda n: n.meta['example']))

    def compile(self) -> fx.GraphModule:
        """A module that runs the graph as it stands now, on the modules of the model."""
        return fx.GraphModule(self.model, self.graph, class_name='Arithmetic')


def trace_arithmetic(model: nn.Module, example: Tensor) -> Arithmetic:
    """Traces ``model(inputs, mode='tensor')`` and folds its BatchNorms.

    Args:
        model: An OpenMMLab model; put into evaluation mode, its BatchNorms are replaced by identities.
        example (Tensor): Preprocessed images, ``(N, 3, H, W)`` with N >= 2, so that the batch size stays symbolic.

    Raises:
        GraphError: The model has no ``tensor`` mode that can be traced.
    """
    model.eval()
    tracer = ConcreteTracer(example)
    try:
        graph = tracer.trace_model(model)
    except Exception as error:
        raise GraphError(f'{type(model).__name__} cannot be traced: {str(error).splitlines()[0]}') from error
    drop_identities(model, graph)
    make_out_of_place(model, graph)
    folded = fold_batch_norms(model, graph)
    return Arithmetic(model, graph, dict(tracer.opaque), folded)


def components_of(model: nn.Module) -> list[nn.Module]:
    """The components that the model has, in the order in which they run."""
    found = [getattr(model, name, None) for name in COMPONENTS]
    return [component for component in found if isinstance(component, nn.Module)]


def plug(model: nn.Module, arithmetic: Callable[[Tensor], Any]) -> None:
    """Makes ``model`` compute ``arithmetic`` wherever it would have run its components."""
    first, *others = components_of(model)
    object.__setattr__(first, 'forward', lambda inputs: arithmetic(inputs))
    for component in others:
        object.__setattr__(component, 'forward', _hand_through)


def _hand_through(value: Any) -> Any:
    return value


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; both are put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
