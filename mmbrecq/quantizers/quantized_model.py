"""A prepared model: its graph, its units, its layers, and the switches of its quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import (
    LARGEST_BIAS,
    BiasCorrection,
    bake_bias,
    bias_correction,
    raise_weight_scale,
    round_bias,
)
from mmbrecq.fake_quants.weight import WeightFakeQuantize, original_weight, pack_weight, weight_fake_quant
from mmbrecq.graph.roles import Roles
from mmbrecq.graph.traced_graph import TracedGraph
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.presets import Preset

CONVOLUTIONS = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class LayerInfo:
    """One convolution or linear layer of the model.

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
class QuantizedModel:
    """What :meth:`BRECQQuantizer.prepare` returns: one graph, and for each head of a two-stage detector another.

    Args:
        model: The OpenMMLab model, its components replaced by the graph.
        traced: The graph with its activation quantizers.
        preset: The rules it was prepared for.
        layers: Every convolution and linear layer that the graph stands for.
        units: In the order of execution.
        cut: Gives the units of another granularity.
        quantizers: Activation quantizers by module path.
        opaque_inputs: Paths of the quantizers of layers that only an opaque module calls, by layer.
        observers: Configs of the range estimators: ``weight`` and ``activation``.
        equalization: How far the ranges of channels are to be made alike before grids are found, 0 to 1.
        heads: Of a two-stage detector, one for each head that reads features of regions; they have no heads themselves.
    """

    model: nn.Module
    traced: TracedGraph
    preset: Preset
    layers: list[LayerInfo]
    units: list[ReconstructionUnit]
    cut: Callable[[str], list[ReconstructionUnit]]
    quantizers: dict[str, FakeQuantize]
    opaque_inputs: dict[str, str] = field(default_factory=dict)
    observers: dict[str, dict[str, object]] = field(default_factory=dict)
    equalization: float = 0.0
    heads: list[QuantizedModel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.compiled = self.traced.compile()
        self.traced.attach(self.compiled)

    @property
    def parts(self) -> list[QuantizedModel]:
        """This graph and those of the heads."""
        return [self, *self.heads]

    @property
    def all_layers(self) -> list[LayerInfo]:
        """Layers of this graph and of those of the heads."""
        return [layer for part in self.parts for layer in part.layers]

    def weights(self) -> Iterator[tuple[str, nn.Module, WeightFakeQuantize]]:
        """Path, module and fake quantizer of every quantized weight that is not packed yet."""
        for layer in self.layers:
            module = self.model.get_submodule(layer.name)
            fake_quant = weight_fake_quant(module)
            if fake_quant is not None:
                yield layer.name, module, fake_quant

    def unit_weights(self, unit: ReconstructionUnit) -> list[tuple[nn.Module, WeightFakeQuantize]]:
        """Modules of a unit that have a quantized weight, with their fake quantizers."""
        return [(module, fq) for name, module, fq in self.weights() if name in unit.layers]

    def unit_quantizers(self, unit: ReconstructionUnit) -> list[FakeQuantize]:
        """Activation quantizers of a unit of this graph."""
        return [self.quantizers[name] for name in self.unit_quantizer_names(unit)]

    def unit_quantizer_names(self, unit: ReconstructionUnit) -> list[str]:
        """Paths of the activation quantizers of a unit, of this graph or of a head's."""
        opaque = {layer: path for part in self.parts for layer, path in part.opaque_inputs.items()}
        return [*unit.quantizers, *(opaque[name] for name in unit.layers if name in opaque)]

    @contextmanager
    def quantization(self, weights: bool, activations: bool) -> Iterator[None]:
        """Switches fake quantization of all weights and of all activations; what was before is put back."""
        switches: list[WeightFakeQuantize | BiasCorrection | FakeQuantize] = []
        for _, module, weight_quantizer in chain.from_iterable(part.weights() for part in self.parts):
            correction = bias_correction(module)
            switches += [weight_quantizer] if correction is None else [weight_quantizer, correction]
        states = [(fq, fq.enabled, weights) for fq in switches]
        states += [(fq, fq.enabled, activations) for part in self.parts for fq in part.quantizers.values()]
        try:
            for fake_quant, _, state in states:
                fake_quant.enabled = state
            yield
        finally:
            for fake_quant, before, _ in states:
                fake_quant.enabled = before

    def pack(self) -> None:
        """Finishes the model: integers in place of float weights, all quantization on for good."""
        for head in self.heads:
            head.pack()
        inputs, read = self._input_quantizers() if self.preset.bias_rounded else {}, self.read_quantizers()
        for name, module, fake_quant in list(self.weights()):
            bake_bias(module)
            scales = [self.quantizers[path].scale for path in read.get(name, ())]
            raise_weight_scale(module, fake_quant, fake_quant.quantized(original_weight(module)), scales, LARGEST_BIAS)
            if name in inputs and isinstance(module, CONVOLUTIONS):
                round_bias(module, inputs[name].scale * fake_quant.scale)
            pack_weight(module)
        for quantizer in self.quantizers.values():
            quantizer.enabled = True
            quantizer.observer = None

    def read_quantizers(self) -> dict[str, set[str]]:
        """Paths of the quantizers of what every layer of the graph reads; one that levels share may read several."""
        read = {layer: sources & set(self.quantizers) for layer, sources in self._sources().items()}
        return {**read, **{layer: {path} for layer, path in self.opaque_inputs.items()}}

    def _input_quantizers(self) -> dict[str, FakeQuantize]:
        """The quantizer of the input of every layer that the graph calls; a layer that reads several has none."""
        return {
            layer: self.quantizers[source]
            for layer, (source, *others) in self._sources().items()
            if source in self.quantizers and not others
        }

    def _sources(self) -> dict[str, set[str]]:
        """What every layer reads, by name."""
        roles = Roles(self.traced.model, self.traced.graph)
        read: dict[str, set[str]] = {}
        for node in self.traced.graph.nodes:
            if roles.is_weighted(node):
                read.setdefault(str(node.target), set()).update(str(n.target) for n in roles.sources(node))
        return read

    def __call__(self, inputs: Tensor) -> object:
        """Raw outputs for preprocessed images, or features of regions, in the present state of the switches."""
        return self.compiled(inputs)
