"""The arithmetic of an OpenMMLab model as graphs, run in place of its components.

The same call runs the float graph, the quantized graph or a deployed file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from mmbrecq.errors import GraphError, first_line
from mmbrecq.graph.components import ImageForward, RegionForward, RegionHead, attach, region_shape
from mmbrecq.graph.layers import bake_weights, make_layers
from mmbrecq.graph.modules import graph_module, set_forward
from mmbrecq.graph.normalize import drop_identities, fold_batch_norms, make_out_of_place
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.tracer import ConcreteTracer


@dataclass
class TracedGraph:
    """A traced part of a model.

    Args:
        model: Owner of all modules that the graph calls.
        graph: From its input to raw outputs; every node carries ``meta['example']`` and ``meta['owner']``.
        path: Of the head of a two-stage detector that the graph stands for; empty for all that follows from the image.
        opaque: Paths of the modules that are one call of the graph, each with the reason.
        folded: Paths of the layers that took a BatchNorm in.
    """

    model: nn.Module
    graph: fx.Graph
    path: str = ''
    opaque: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)

    @property
    def example(self) -> Tensor:
        """The input that the graph was traced with."""
        example: Tensor = next(n for n in self.graph.nodes if n.op == 'placeholder').meta['example']
        return example

    def attach(self, run: Callable[[Tensor], Any]) -> None:
        """Makes the model compute ``run`` wherever it would have run the modules that the graph stands for."""
        if self.path:
            set_forward(self.model.get_submodule(self.path), run)
        else:
            attach(self.model, run)

    def example_outputs(self) -> dict[str, Tensor]:
        """The outputs for the traced images by name, see :mod:`mmbrecq.graph.structure`."""
        output = next(n for n in self.graph.nodes if n.op == 'output')
        return flatten_outputs(fx.node.map_arg(output.args[0], lambda n: n.meta['example']))

    def compile(self) -> fx.GraphModule:
        """A module that runs the graph as it stands now, on the modules of the model."""
        return graph_module(self.model, self.graph, 'TracedGraph')


def trace_image_graph(model: nn.Module, example: Tensor) -> TracedGraph:
    """Traces what follows from the image alone and folds its BatchNorms.

    Args:
        model: An OpenMMLab model; put into evaluation mode, its BatchNorms are replaced by identities.
        example (Tensor): Preprocessed images, ``(N, 3, H, W)`` with N >= 2, so that the batch size stays symbolic.

    Raises:
        GraphError: It cannot be traced.
    """
    return _trace(model, ImageForward(model), example, type(model).__name__)


def trace_region_head(model: nn.Module, head: RegionHead) -> TracedGraph:
    """Traces one head of a two-stage detector, see :func:`trace_image_graph`."""
    device = next(model.parameters()).device
    example = torch.zeros((2, *region_shape(model, head)), device=device)
    traced = _trace(model, RegionForward(model, head.path), example, head.path)
    traced.path = head.path
    return traced


def _trace(model: nn.Module, entry: nn.Module, example: Tensor, name: str) -> TracedGraph:
    model.eval()
    with torch.no_grad():
        computing = bake_weights(model, lambda: entry(example))
    tracer = ConcreteTracer(example, computing)
    try:
        graph = tracer.trace_model(model, entry)
    except Exception as error:
        raise GraphError(f'{name} cannot be traced: {first_line(error)}') from error
    drop_identities(model, graph)
    make_out_of_place(model, graph)
    make_layers(model, graph)
    folded = fold_batch_norms(model, graph)
    return TracedGraph(model, graph, opaque=dict(tracer.opaque), folded=folded)


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
