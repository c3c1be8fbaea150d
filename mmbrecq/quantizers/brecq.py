"""Prepares a float model for block reconstruction (BRECQ, Li et al., ICLR 2021)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.building import build, parse_options
from mmbrecq.errors import ConfigError, GraphError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import correct_bias
from mmbrecq.graph.attention import write_out_attention
from mmbrecq.graph.blocks import find_blocks
from mmbrecq.graph.components import region_heads
from mmbrecq.graph.merge import merge_branches
from mmbrecq.graph.placement import QuantizerPosition, find_positions
from mmbrecq.graph.roles import Roles
from mmbrecq.graph.symbolic import sources_of
from mmbrecq.graph.traced_graph import TracedGraph, trace_image_graph, trace_region_head
from mmbrecq.graph.tracer import TRANSPOSED, WEIGHTED
from mmbrecq.graph.units import ReconstructionUnit, check_granularity, cut_units, is_below
from mmbrecq.presets import get_preset
from mmbrecq.qtype import MAX_BITS
from mmbrecq.quantizers import options
from mmbrecq.quantizers.quantized_model import UNCALLED, LayerInfo, QuantizedGraph, QuantizedModel
from mmbrecq.registry import FAKE_QUANTS, QUANTIZERS

ACTIVATION_QUANTIZERS = 'activation_quantizers'
"""Attribute of the model that holds its activation quantizers."""

LARGEST_SCORES = 2**22
"""Scores of an image above which an attention stays fused if a kernel is all that is to gain: fused it keeps none."""

Bits = dict[str, tuple[int | None, int | None]]


@QUANTIZERS.register_module()
class BRECQQuantizer:
    """Prepares a model: traces it, folds its BatchNorms, inserts fake quantizers, cuts it into units.

    Args:
        weight: Options of :class:`WeightOptions`.
        activation: Options of :class:`ActivationOptions`; None leaves activations in float (W4A32).
        preset: ``academic``, ``onnxruntime``, ``openvino`` or ``tensorrt``.
        first_last_8bit: Weights and input of the first and of the last layer at 8 bits.
        overrides: Options of :class:`Override`, applied in order.
        granularity: ``layer``, ``block``, ``stage`` or ``net``.
        blocks: Module types or path patterns that are blocks; None to find them by structure.
        equalization: How far the ranges of channels are made alike before grids are found, from 0, not at all, to 1.
        smoothing: The same for channels that a normalisation with gains of its own writes and layers alone read: the
            inputs of linear layers in transformers.
        merge_branches: Whether modules that have a merged form for deployment (RepVGG, MobileOne) are merged first.
        fallback: Options of :class:`FallbackOptions`: which layers stay in float since 8 bits hurt their inputs; by
            default those of the preset.
        products: Whether both operands of every product of activations are quantized, as in attention; None for the
            preset's choice.

    Raises:
        ConfigError: An option is unknown or out of range.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> quantizer = BRECQQuantizer({'bits': 4}, {'bits': 8}, preset='openvino', first_last_8bit=False)
        >>> [(layer.name, layer.weight_bits) for layer in quantizer.prepare(model, torch.rand(2, 3, 8, 8)).layers]
        [('0', 4), ('2', 4)]
    """

    def __init__(
        self,
        weight: Mapping[str, Any],
        activation: Mapping[str, Any] | None = None,
        preset: str = 'academic',
        first_last_8bit: bool = True,
        overrides: Sequence[Mapping[str, Any]] = (),
        granularity: str = 'block',
        blocks: Sequence[str] | None = None,
        equalization: float = 0.0,
        smoothing: float = 0.5,
        merge_branches: bool = True,
        fallback: Mapping[str, Any] | None = None,
        products: bool | None = None,
    ) -> None:
        self.preset = get_preset(preset)
        if products is not None:
            if not isinstance(products, bool):
                raise ConfigError(f'expected quantizer.products to be a boolean or None, but got {products!r}')
            self.preset = replace(self.preset, products='all' if products else 'none')
        self.weight = parse_options(options.WeightOptions, weight, 'quantizer.weight')
        self.activation = parse_options(
            options.ActivationOptions, {'bits': None} if activation is None else activation, 'quantizer.activation'
        )
        self.weight_bits = options.check_bits(self.weight.bits, 'quantizer.weight.bits')
        self.activation_bits = options.check_bits(self.activation.bits, 'quantizer.activation.bits')
        self.overrides = [
            parse_options(options.Override, o, f'quantizer.overrides[{i}]') for i, o in enumerate(overrides)
        ]
        check_granularity(granularity, 'quantizer.granularity')
        for name, value in (('equalization', equalization), ('smoothing', smoothing)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f'expected quantizer.{name} to be a number in [0, 1], but got {value!r}')
        if not isinstance(merge_branches, bool):
            raise ConfigError(f'expected quantizer.merge_branches to be a boolean, but got {merge_branches!r}')
        self.first_last_8bit, self.granularity, self.blocks = first_last_8bit, granularity, blocks
        default = {} if self.preset.falls_back else {'limit': 0.0}
        self.fallback = parse_options(options.FallbackOptions, fallback or {}, 'quantizer.fallback', **default)
        self.equalization, self.smoothing, self.merge_branches = float(equalization), float(smoothing), merge_branches

    def prepare(self, model: nn.Module, example: Tensor) -> QuantizedModel:
        """Returns the quantized form of a float model, which is changed in place; its grids are to be calibrated.

        ``example`` are preprocessed images, ``(N, C, H, W)``, N >= 2.
        """
        if self.merge_branches:
            merge_branches(model, example)
        traced = trace_image_graph(model, example)
        heads = [trace_region_head(model, head) for head in region_heads(model)]
        bits = self._assign_bits([traced, *heads])
        setattr(model, ACTIVATION_QUANTIZERS, nn.ModuleDict())
        graphs = [self._quantize(graph, bits) for graph in (traced, *heads)]
        for graph in (traced, *heads):
            graph.keep_shapes(graph.example if graph.path else torch.cat([example, example])[:2])
        # fake quantizers are made on the CPU
        model.requires_grad_(False).to(example.device)
        observers = {'weight': dict(self.weight.observer), 'activation': dict(self.activation.observer)}
        return QuantizedModel(model, graphs, observers, self.equalization, self.smoothing)

    def _assign_bits(self, graphs: Sequence[TracedGraph]) -> Bits:
        """Returns the bits of every layer of every graph; overrides are patterns over all of them."""
        model = graphs[0].model
        called = {layer: None for graph in graphs for layer in _called_layers(graph)}
        if not called:
            raise GraphError(f'expected {type(model).__name__} to have a convolution or linear layer, but found none')
        first_last: set[str] = set()
        for graph in graphs if self.first_last_8bit else ():
            first, last = _first_and_last(Roles(model, graph.graph))
            # the heads run after the layers that compute their features
            first_last |= last if graph.path else first | last
        return options.assign_bits(list(called), first_last, self.weight_bits, self.activation_bits, self.overrides)

    def _quantize(self, traced: TracedGraph, all_bits: Bits) -> QuantizedGraph:
        """Inserts the quantizers of one graph; ``all_bits`` names the layers of the others too."""
        bits = {layer: all_bits[layer] for layer in _called_layers(traced)}
        blocks = find_blocks(traced.model, traced.graph, self.blocks)
        if self.preset.products != 'none':
            write_out_attention(traced.graph, LARGEST_SCORES if self.preset.products == 'scores' else math.inf)
        names = []
        for position in find_positions(Roles(traced.model, traced.graph), self.preset):
            names += self._insert(traced, position, bits)
        opaque_inputs = self._quantize_opaque(traced, bits)
        model = traced.model
        quantized = {layer: weight_bits for layer, (weight_bits, _) in bits.items() if weight_bits is not None}
        for layer, weight_bits in quantized.items():
            self._quantize_weight(model, layer, weight_bits)
        found = {name: model.get_submodule(name) for name in (*names, *opaque_inputs.values())}
        quantizers = {name: module for name, module in found.items() if isinstance(module, FakeQuantize)}

        def cut(granularity: str) -> list[ReconstructionUnit]:
            units = cut_units(model, traced.graph, set(quantized), set(quantizers), blocks, traced.path, granularity)
            more = [tuple(opaque_inputs[n] for n in unit.layers if n in opaque_inputs) for unit in units]
            return [replace(unit, quantizers=unit.quantizers + own) for unit, own in zip(units, more, strict=True)]

        units = cut(self.granularity)
        reasons = {override.pattern: override.reason for override in self.overrides if override.reason}
        layers = _list_layers(traced, bits, units, reasons)
        return QuantizedGraph(traced, self.preset, layers, units, cut, quantizers, opaque_inputs)

    def _insert(self, traced: TracedGraph, position: QuantizerPosition, bits: Bits) -> list[str]:
        """Inserts the quantizer of a position; returns its path, or nothing where the values stay in float."""
        # the most of its readers; where no layer reads it the default, but for the output of a layer in float
        own = [b for b in (bits[layer][1] for layer in position.layers) if b is not None]
        writers = [bits.get(str(node.target), (None, self.activation_bits))[1] for node in position.nodes]
        unread = self.activation_bits if any(b is not None for b in writers) else None
        position_bits = max(own, default=None) if position.layers else unread
        if position_bits is None:
            return []
        name = f'{traced.path}_{position.name}'.replace('.', '_') if traced.path else position.name
        path = self._add_quantizer(traced.model, name, position, MAX_BITS if position.eight_bits else position_bits)
        for node in position.nodes:
            with traced.graph.inserting_after(node):
                new = traced.graph.call_module(path, (node,))
            new.meta.update({key: node.meta[key] for key in ('owner', 'example', 'by_image') if key in node.meta})
            for user in list(node.users):
                if user is not new and user not in position.float_readers:
                    user.replace_input_with(node, new)
        return [path]

    def _add_quantizer(self, model: nn.Module, name: str, position: QuantizerPosition, bits: int) -> str:
        given, node = self.activation, position.nodes[0] if position.nodes else None
        symmetric = True if position.symmetric else given.symmetric
        qtype = self.preset.activation_qtype(bits, position.non_negative, symmetric, given.per_channel)
        folds = self.preset.folds_channel_scales
        if position.shifts and given.symmetric is None and qtype.signed:
            qtype = replace(qtype, symmetric=False)
        # OpenVINO has signed integers below 8 bits cut as real values, by one pair of bounds
        if position.per_channel and (folds or not (qtype.signed and bits < MAX_BITS)):
            qtype = replace(qtype, ch_axis=1)
        channels = 1 if node is None or qtype.ch_axis is None else node.meta['example'].shape[qtype.ch_axis]
        quantizer = build(
            FAKE_QUANTS, dict(given.fake_quant), qtype=qtype, channels=channels,
            integer_clip=self.preset.integer_clip or (position.per_channel and folds), full_scale=position.full_scale,
        )  # fmt: skip
        quantizer.bounds = position.bounds
        # its gradient would need the first layer's backward pass down to the images, and 256 levels gain nothing by it
        quantizer.fixed = node is not None and node.op == 'placeholder' and bits == 8
        holder = model.get_submodule(ACTIVATION_QUANTIZERS)
        while hasattr(holder, name):
            # a method of modules, such as `to`
            name += '_'
        holder.add_module(name, quantizer)
        return f'{ACTIVATION_QUANTIZERS}.{name}'

    def _quantize_opaque(self, traced: TracedGraph, bits: Bits) -> dict[str, str]:
        """Quantizes the input of every layer that only an opaque module calls, by a hook on the layer."""
        paths = {}
        for layer, (_, activation_bits) in bits.items():
            if activation_bits is None or not any(is_below(layer, path) for path in traced.opaque):
                continue
            position = QuantizerPosition(layer.replace('.', '_') + '_input', (), (layer,), non_negative=False)
            paths[layer] = self._add_quantizer(traced.model, position.name, position, activation_bits)
            quantizer = traced.model.get_submodule(paths[layer])
            traced.model.get_submodule(layer).register_forward_pre_hook(partial(_quantize_first, quantizer))
        return paths

    def _quantize_weight(self, model: nn.Module, layer: str, bits: int) -> None:
        module: Any = model.get_submodule(layer)
        if module.weight.dtype != torch.float32:
            raise GraphError(f'expected layers in torch.float32, but got {layer} in {module.weight.dtype}')
        transposed = isinstance(module, TRANSPOSED)
        per_channel = self.weight.per_channel and not (transposed and module.groups > 1)
        qtype = self.preset.weight_qtype(bits, per_channel, int(transposed), self.weight.symmetric)
        fake_quant = build(FAKE_QUANTS, dict(self.weight.rounding), qtype=qtype, shape=module.weight.shape)
        module.weight.requires_grad_(False)
        parametrize.register_parametrization(module, 'weight', fake_quant, unsafe=True)
        correct_bias(module)


def _quantize_first(quantizer: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (quantizer(args[0]), *args[1:])


def _called_layers(traced: TracedGraph) -> list[str]:
    """Returns the paths of the layers that the graph runs, within opaque modules too, in the order of their calls."""
    return list(dict.fromkeys(layer for node in traced.graph.nodes for layer in node.meta.get('layers', ())))


def _first_and_last(roles: Roles) -> tuple[set[str], set[str]]:
    """Returns the layers that no other layer precedes, and the layers that no other layer follows."""
    weighted = {n for n in roles.graph.nodes if roles.is_weighted(n)}
    before = {n: (sources_of(n) & weighted) - {n} for n in weighted}
    followed = set().union(*before.values())
    first = {str(n.target) for n in weighted if not before[n]}
    return first, {str(n.target) for n in weighted - followed}


def _list_layers(
    traced: TracedGraph, bits: Bits, units: list[ReconstructionUnit], reasons: Mapping[str, str]
) -> list[LayerInfo]:
    unit_of = {layer: unit.name for unit in units for layer in unit.layers}
    layers = []
    others = [] if traced.path else [head.path for head in region_heads(traced.model)]
    for name, module in traced.model.named_modules():
        own = is_below(name, traced.path) and not any(is_below(name, path) for path in others)
        # one that computes something else than its class has a layer below it
        is_replaced = name not in bits and any(is_below(layer, name) for layer in bits)
        if not own or is_replaced or not isinstance(module, WEIGHTED):
            continue
        weight_bits, activation_bits = bits.get(name, (None, None))
        floated = reasons.get(name, "the config says 'float'") if weight_bits is None else None
        reason = UNCALLED if name not in bits else floated
        kind = type(module).__name__.removeprefix('Parametrized')
        layers.append(LayerInfo(name, kind, unit_of.get(name), weight_bits, activation_bits, reason))
    return layers
