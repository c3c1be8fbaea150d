"""The shapes of layers and of their calls, on which costs depend."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import BiasCorrection
from mmbrecq.fake_quants.weight import original_weight, weight_fake_quant
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel

REGIONS = 1000
"""Regions that an RPN hands to the heads where the detector's config does not say."""

Bits = tuple[int | None, int | None]
"""Bits of a weight and of the input of its layer, None for float."""
FLOAT_BITS = 32
"""Float counts as these; as a candidate they leave the weight of a layer in float."""


@dataclass(frozen=True)
class Call:
    """One call of a layer for one image: shapes without the batch axis, and how often, such as once per region."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    times: int = 1


@dataclass(frozen=True)
class LayerShape:
    """One convolution or linear layer.

    Args:
        kind: Its class name.
        weight: Shape of its weight.
        calls: Of one image; a head that pyramid levels share has one for each.
        bits: As the model was prepared.
        scales: Number of scales of its weight; it has no zero-points where it is ``symmetric``.
        options: Stride, padding, dilation and groups of a convolution.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    calls: tuple[Call, ...]
    bits: Bits
    scales: int
    symmetric: bool
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def macs(self) -> int:
        """Multiplications for one image."""
        transposed = 'Transpose' in self.kind
        per_element = prod(self.weight[1:])
        return sum(prod(call.inputs if transposed else call.outputs) * per_element * call.times for call in self.calls)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.weight)


def layer_shapes(model: QuantizedModel) -> list[LayerShape]:
    """Returns the quantized layers in the order of their first call, for images like the model's example."""
    found = []
    for graph in model.graphs:
        calls = _calls(model, graph)
        for layer in graph.layers:
            module: Any = model.model.get_submodule(layer.name)
            fake_quant = weight_fake_quant(module)
            if fake_quant is None:
                continue
            names = ('stride', 'padding', 'dilation', 'groups')
            options = tuple((name, getattr(module, name)) for name in names if hasattr(module, name))
            bits = (layer.weight_bits, layer.activation_bits)
            found.append(
                LayerShape(
                    layer.name, layer.kind, tuple(module.weight.shape), tuple(calls[layer.name]), bits,
                    fake_quant.scale.numel(), fake_quant.qtype.symmetric, options,
                )
            )  # fmt: skip
    return found


def other_bytes(model: QuantizedModel) -> int:
    """Returns the bytes of the parameters that are no weight of a quantized layer, all of them float."""
    quantized = [original_weight(module) for _, module, _ in model.weights()]
    quantizers = [m for m in model.model.modules() if isinstance(m, (FakeQuantize, BiasCorrection))]
    added = {id(p) for module in quantizers for p in module.parameters()}
    total = sum(p.numel() for p in model.model.parameters() if id(p) not in added)
    return 4 * (total - sum(weight.numel() for weight in quantized))


def _calls(model: QuantizedModel, graph: QuantizedGraph) -> dict[str, list[Call]]:
    """Runs one graph of a model in float and returns the calls of every layer."""
    calls: dict[str, list[Call]] = {layer.name: [] for layer in graph.layers}
    rpn = (getattr(model.model, 'test_cfg', None) or {}).get('rpn') or {}
    # regions of one image that the heads of a two-stage detector process in a test
    times = int(rpn.get('max_per_img', REGIONS)) if graph.is_region else 1

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name].append(Call(tuple(args[0].shape[1:]), tuple(output.shape[1:]), times))

    with ExitStack() as stack:
        for name in calls:
            stack.enter_context(graph.model.get_submodule(name).register_forward_hook(partial(record, name)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(model.quantization(weights=False, activations=False))
        graph(graph.traced.example)
    return calls
