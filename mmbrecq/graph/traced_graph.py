"""Traces the arithmetic of a model into graphs, which run instead of its components."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.errors import GraphError, first_line
from mmbrecq.graph import components
from mmbrecq.graph.components import ImageForward, RegionForward, RegionHead, graph_module
from mmbrecq.graph.functionalize import functionalize, switch_off_in_place
from mmbrecq.graph.layers import bake_weights, copy_read_parameters, fold_constants, free_name, make_layers
from mmbrecq.graph.normalize import drop_identities, fold_batch_norms, index_squeezes, read_past_concatenations
from mmbrecq.graph.shapes import note_shapes
from mmbrecq.graph.sizes import keep_sizes, resolve_sizes
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.symbolic import obstacle, tensors_in
from mmbrecq.graph.tracer import ConcreteTracer, UntraceableError

LARGE = 2**18
"""Most pixels of an image that is traced as it is; of a larger one a corner is, where the model runs at any size."""


@dataclass
class TracedGraph:
    """Holds a traced graph of a model.

    Args:
        model: Owner of all modules that the graph calls.
        graph: The nodes from the input to raw outputs, with ``meta['example']``, their values or, after
            :meth:`keep_shapes`, the shapes of these, and ``meta['owner']``.
        path: Path of the head of a two-stage detector that the graph computes; empty for the graph of the images.
        opaque: Paths of the modules that are one call of the graph, each with the reason.
        value_dependent: Paths of the opaque modules whose Python reads values of tensors, which no file can express.
        frozen: Lines that bind the graph to one height and width, as ``path: file:line``; empty where they are free.
        sizes_vary: Whether images are of several heights and widths: of detectors, but not of classifiers.
        restore: Makes of the outputs of the graph what the model itself returns, such as a dataclass.
    """

    model: nn.Module
    graph: fx.Graph
    path: str = ''
    opaque: dict[str, str] = field(default_factory=dict)
    value_dependent: set[str] = field(default_factory=set)
    frozen: list[str] = field(default_factory=list)
    sizes_vary: bool = False
    restore: Callable[[Any], Any] = lambda outputs: outputs

    @property
    def free_size(self) -> bool:
        """Whether the graph is right for other heights and widths than it was traced with."""
        return not self.frozen

    @property
    def example(self) -> Tensor:
        """The input that the examples follow from."""
        return self._input.meta['example']

    @property
    def _input(self) -> fx.Node:
        return next(n for n in self.graph.nodes if n.op == 'placeholder')

    @property
    def volume(self) -> int:
        """Number of values that the graph computes of one image."""
        examples = [value for node in self.graph.nodes for value in tensors_in(node.meta.get('example'))]
        return sum(value.numel() for value in examples) // len(self.example)

    def keep_shapes(self, images: Tensor) -> None:
        """Replaces values that follow from the input by their shapes for ``images``, as tensors on the device meta.

        Constants keep their values, and numbers are those of ``images``.

        Raises:
            GraphError: The graph does not run on ``images``.
        """
        note_shapes(self.model, self.graph, images)
        self._input.meta['example'] = images

    def attach(self, run: Callable[[Tensor], Any]) -> None:
        """Makes the model compute ``run`` instead of the modules from which the graph was traced."""
        if self.path:
            components.set_forward(self.model.get_submodule(self.path), run)
        else:
            components.attach(self.model, run)

    def example_outputs(self) -> dict[str, Tensor]:
        """Returns the outputs for the traced images by name, see :mod:`mmbrecq.graph.structure`."""
        output = next(n for n in self.graph.nodes if n.op == 'output')
        return flatten_outputs(fx.node.map_arg(output.args[0], lambda n: n.meta['example']))

    def compile(self) -> fx.GraphModule:
        """Returns a module that runs the present graph on the modules of the model."""
        module = graph_module(self.model, self.graph, 'TracedGraph')
        if not self.free_size:
            module.register_forward_pre_hook(partial(_expect_size, tuple(self.example.shape[1:])))
        return module


def trace_image_graph(model: nn.Module, example: Tensor) -> TracedGraph:
    """Traces all that follows from the image alone and folds its BatchNorms; GraphError if it cannot be traced.

    The model is put into evaluation mode, its BatchNorms are replaced by identities; ``example`` is ``(N, 3, H, W)``.
    """
    return _trace(model, ImageForward(model), example)


def trace_region_head(model: nn.Module, head: RegionHead) -> TracedGraph:
    """Traces one head of a two-stage detector, see :func:`trace_image_graph`."""
    example = torch.zeros((2, *components.region_shape(model, head)), device=next(model.parameters()).device)
    return _trace(model, RegionForward(model, head.path), example, head.path)


def _trace(model: nn.Module, entry: nn.Module, example: Tensor, path: str = '') -> TracedGraph:
    model.eval()
    corner, traced = smaller(example), None
    if corner is not example:
        with suppress(Exception):
            traced = _trace_with(model, entry, corner, path)
    if traced is None or not traced.free_size:
        traced = _trace_with(model, entry, example, path)
    switch_off_in_place(model, traced.graph, traced.opaque)
    make_layers(model, traced.graph)
    fold_constants(model, traced.graph)
    fold_batch_norms(model, traced.graph)
    copy_read_parameters(model, traced.graph)
    return traced


def _trace_with(model: nn.Module, entry: nn.Module, example: Tensor, path: str) -> TracedGraph:
    """Traces a model as it is; modules that cannot be traced are one call each."""
    with torch.no_grad():
        computing = bake_weights(model, lambda: entry(example))
    forced: dict[str, str] = {}
    by_size = set()
    while True:
        try:
            traced = _trace_at_sizes(model, entry, example, forced, computing)
            break
        except Exception as error:
            if not isinstance(error, UntraceableError) or not error.owner or error.owner in forced:
                name = path or type(model).__name__
                raise GraphError(f'{name} cannot be traced: {obstacle(error)}') from error
            forced[error.owner] = first_line(error)
            by_size |= {error.owner} if error.by_size else set()
    traced.path = path
    traced.value_dependent |= by_size & set(traced.opaque)
    return traced


def _trace_at_sizes(
    model: nn.Module, entry: nn.Module, example: Tensor, forced: Mapping[str, str], computing: Collection[str]
) -> TracedGraph:
    def trace(images: Tensor) -> ConcreteTracer:
        tracer = ConcreteTracer(images, forced, computing)
        graph = tracer.trace_model(model, entry)
        functionalize(model, graph, tracer.constants)
        drop_identities(model, graph)
        return tracer

    pair = torch.cat([example, example])[:2]
    base, more = trace(pair), keep_sizes(trace(torch.cat([pair, pair[:1]])))
    traced = TracedGraph(
        model, base.graph, opaque=base.opaque, value_dependent=base.value_dependent, restore=base.restore
    )
    has_maps = any(output.dim() == 4 for output in traced.example_outputs().values())
    traced.sizes_vary = has_maps or components.has_transformer(model)
    wider = None
    if isinstance(entry, ImageForward) and example.dim() == 4:
        with suppress(Exception):
            wider = keep_sizes(trace(other_size(pair)))
    traced.frozen = resolve_sizes(base, more, wider, keep_free=traced.sizes_vary)
    for target, value in base.constants.items():
        _register(model, base.graph, target, value)
    index_squeezes(base.graph)
    read_past_concatenations(base.graph)
    drop_identities(model, base.graph)
    return traced


def other_size(images: Tensor) -> Tensor:
    """Returns the images, repeated at their borders to another height and width.

    Maps of every stride up to 128 get another size by it: a size that two traces share would be taken for a constant.
    Small images grow by less, for attention between all of their positions grows with the square.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, min(2 * width, 128), 0, min(3 * height, 192)), mode='replicate')


def smaller(images: Tensor, least: int = 192) -> Tensor:
    """Returns the upper left corner of large images, of at least so many rows and columns.

    Maps of every stride up to 128 are cut at the same position within their last row and column.
    """
    height, width = images.shape[-2:]
    if images.dim() != 4 or height * width <= LARGE:
        return images
    return images[..., : min(height, least + (height - least) % 128), : min(width, least + (width - least) % 128)]


def _register(model: nn.Module, graph: fx.Graph, target: str, value: Tensor) -> None:
    """Registers a constant of the graph as a buffer of the model that no checkpoint holds."""
    nodes = [n for n in graph.nodes if n.op == 'get_attr' and n.target == target]
    if nodes:
        name = free_name(model, 'traced_constant')
        model.register_buffer(name, value, persistent=False)
        for node in nodes:
            node.target = name
            node.meta['example'] = value


def _expect_size(shape: tuple[int, ...], module: nn.Module, args: tuple[Any, ...]) -> None:
    if tuple(args[0].shape[1:]) != shape:
        expected, found = (' x '.join(map(str, s)) for s in (shape, args[0].shape[1:]))
        raise GraphError(f'expected images of {expected}, which the model computes with as numbers, but got {found}')


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches to evaluation mode without gradients within the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
