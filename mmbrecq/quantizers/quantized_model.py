"""Holds a prepared model: its graphs, their units and layers, and the switches of its quantization."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmbrecq.fake_quants import bias
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.weight import WeightFakeQuantize, pack_weight, weight_fake_quant
from mmbrecq.graph.roles import Roles
from mmbrecq.graph.traced_graph import TracedGraph
from mmbrecq.graph.tracer import CONVOLUTIONS
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.presets import Preset

UNCALLED = 'it lies on no path from the images to the outputs'
"""Reason of a layer that no graph runs."""


@dataclass(frozen=True)
class LayerInfo:
    """Describes one convolution or linear layer of the model.

    Args:
        name: Its path.
        kind: Its class name.
        unit: Name of the unit that reconstructs it, None where it has none.
        weight_bits: Bits of its weight, None for float.
        activation_bits: Bits of its input, None for float.
        float_reason: Why its weight is float, None where it is not.
    """

    name: str
    kind: str
    unit: str | None
    weight_bits: int | None
    activation_bits: int | None
    float_reason: str | None = None


@dataclass
class QuantizedGraph:
    """Computes one graph of a prepared model: all that follows from the image, or one head that reads regions.

    Args:
        traced: The graph with its activation quantizers.
        preset: The preset it was prepared for.
        layers: Every convolution and linear layer from which the graph was traced.
        units: The units in the order of execution.
        cut: Returns the units of another granularity.
        quantizers: Activation quantizers by module path.
        opaque_inputs: Paths of the quantizers of layers that only an opaque module calls, by layer.
    """

    traced: TracedGraph
    preset: Preset
    layers: list[LayerInfo]
    units: list[ReconstructionUnit]
    cut: Callable[[str], list[ReconstructionUnit]]
    quantizers: dict[str, FakeQuantize]
    opaque_inputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compiled = self.traced.compile()
        self.attach()

    @property
    def model(self) -> nn.Module:
        """The module that owns all modules of the graph."""
        return self.traced.model

    @property
    def path(self) -> str:
        """Path of the head that the graph computes; empty for the graph of the images."""
        return self.traced.path

    @property
    def is_region(self) -> bool:
        """Whether the graph reads features of regions, not images."""
        return bool(self.path)

    def attach(self) -> None:
        """Makes the model compute this graph instead of the modules from which it was traced."""
        self.traced.attach(self)

    def weights(self) -> Iterator[tuple[str, nn.Module, WeightFakeQuantize]]:
        """Yields path, module and fake quantizer of every quantized weight that is not packed yet."""
        for layer in self.layers:
            module = self.model.get_submodule(layer.name)
            fake_quant = weight_fake_quant(module)
            if fake_quant is not None:
                yield layer.name, module, fake_quant

    def unit_weights(self, unit: ReconstructionUnit) -> list[tuple[nn.Module, WeightFakeQuantize]]:
        """Returns the modules of a unit that have a quantized weight, with their fake quantizers."""
        return [(module, fq) for name, module, fq in self.weights() if name in unit.layers]

    def unit_quantizers(self, unit: ReconstructionUnit) -> list[FakeQuantize]:
        """Returns the activation quantizers of a unit."""
        return [self.quantizers[name] for name in unit.quantizers]

    @contextmanager
    def quantization(self, weights: bool | Collection[str], activations: bool | Collection[str]) -> Iterator[None]:
        """Switches fake quantization of all weights and activations within the block, or on for given paths alone."""
        assert isinstance(activations, bool) or set(activations) <= self.quantizers.keys()

        def is_on(state: bool | Collection[str], path: str) -> bool:
            return state if isinstance(state, bool) else path in state

        switches: list[tuple[Any, bool]] = [(fq, is_on(activations, path)) for path, fq in self.quantizers.items()]
        for name, module, fake_quant in self.weights():
            owners = (fake_quant, bias.bias_correction(module))
            switches += [(owner, is_on(weights, name)) for owner in owners if owner is not None]
        before = [owner.enabled for owner, _ in switches]
        try:
            for owner, state in switches:
                owner.enabled = state
            yield
        finally:
            for (owner, _), state in zip(switches, before, strict=True):
                owner.enabled = state

    def pack(self) -> None:
        """Replaces float weights by integers, and switches all quantization on for good."""
        sources, read = self._sources(), self.read_quantizers()
        for name, module, fake_quant in list(self.weights()):
            bias.bake_bias(module)
            scales = [self.quantizers[p].scale for p in read.get(name, ())]
            bias.raise_weight_scale(module, fake_quant, fake_quant.values, scales, bias.LARGEST_BIAS)
            # a layer that reads several values has no single scale of its input
            source = next(iter(sources[name])) if len(sources.get(name, ())) == 1 else None
            is_apart = self.preset.bias_apart == 'linear' and not isinstance(module, CONVOLUTIONS)
            if self.preset.bias_rounded and source in self.quantizers and not is_apart:
                scale = bias.scale_read(module, self.quantizers[source].scale) * fake_quant.scale
                bias.round_bias(module, scale)
            pack_weight(module)
        for quantizer in self.quantizers.values():
            quantizer.enabled = True
            quantizer.observer = None

    def read_quantizers(self) -> dict[str, set[str]]:
        """Returns the paths of the quantizers of every layer's inputs; a layer that is called often has several."""
        read = {layer: sources & set(self.quantizers) for layer, sources in self._sources().items()}
        return {**read, **{layer: {path} for layer, path in self.opaque_inputs.items()}}

    def _sources(self) -> dict[str, set[str]]:
        """Returns the names of the values that every layer reads."""
        roles = Roles(self.model, self.traced.graph)
        read: dict[str, set[str]] = {}
        for node in self.traced.graph.nodes:
            if roles.is_weighted(node):
                read.setdefault(str(node.target), set()).update(str(n.target) for n in roles.sources(node))
        return read

    def __call__(self, inputs: Tensor) -> object:
        """Computes raw outputs of images, or of features of regions, in the present state of the switches."""
        return self.traced.restore(self.compiled(inputs))


@dataclass
class QuantizedModel:
    """Holds a prepared model, its graphs, and the switches of its quantization.

    Args:
        model: The model, its modules computed by the graphs.
        graphs: The graph of the images, then one for each head of a two-stage detector that reads regions.
        observers: Configs of the range estimators: ``weight`` and ``activation``.
        equalization: How far the ranges of channels are made alike before grids are found, 0 to 1.
        smoothing: The same for channels that normalisations alone write.
    """

    model: nn.Module
    graphs: list[QuantizedGraph]
    observers: dict[str, dict[str, object]]
    equalization: float = 0.0
    smoothing: float = 0.0

    @property
    def image_graph(self) -> QuantizedGraph:
        """The graph that reads images."""
        return self.graphs[0]

    @property
    def region_graphs(self) -> list[QuantizedGraph]:
        """The graphs that read features of regions."""
        return self.graphs[1:]

    @property
    def preset(self) -> Preset:
        """The preset that the model was prepared for."""
        return self.image_graph.preset

    @property
    def layers(self) -> list[LayerInfo]:
        """The layers of all graphs."""
        return [layer for graph in self.graphs for layer in graph.layers]

    @property
    def quantizes_activations(self) -> bool:
        """Whether any activation lies on a grid."""
        return any(graph.quantizers for graph in self.graphs)

    def weights(self) -> Iterator[tuple[str, nn.Module, WeightFakeQuantize]]:
        """Yields path, module and fake quantizer of every quantized weight that is not packed yet."""
        for graph in self.graphs:
            yield from graph.weights()

    def attach(self) -> None:
        """Makes the model compute the graphs, after a deployed file or a recorder was attached instead."""
        for graph in self.graphs:
            graph.attach()

    @contextmanager
    def quantization(self, weights: bool, activations: bool) -> Iterator[None]:
        """Switches fake quantization of all weights and of all activations within the block."""
        with ExitStack() as stack:
            for graph in self.graphs:
                stack.enter_context(graph.quantization(weights, activations))
            yield

    def pack(self) -> None:
        """Replaces float weights by integers, and switches all quantization on for good."""
        for graph in self.graphs:
            graph.pack()

    def __call__(self, images: Tensor) -> object:
        """Computes raw outputs of preprocessed images, in the present state of the switches."""
        return self.image_graph(images)
