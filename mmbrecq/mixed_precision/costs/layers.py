"""What a layer computes, as far as its cost depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
"""Of a weight and of the input of its layer, None for float."""


@dataclass(frozen=True)
class Call:
    """One call of a layer for one image.

    Args:
        inputs: Shape of its input, without the batch axis.
        outputs: Shape of its output.
        times: How often, such as the number of regions that a head looks at.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    times: int = 1


@dataclass(frozen=True)
class LayerShape:
    """One convolution or linear layer.

    Args:
        name: Its path.
        kind: Its class name.
        weight: Shape of its weight.
        calls: Of one image; a head that pyramid levels share has one for each.
        bits: As the model was prepared.
        scales: Number of scales of its weight.
        symmetric: Whether its weight has no zero-points.
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
    """Shapes of all quantized layers for images as the model was traced with, in the order of their first call.

    Args:
        model: Prepared, not packed.
    """
    found = []
    for part in model.graphs:
        example = part.traced.example
        times = 1 if not part.is_region else _regions(model.model)
        with torch.no_grad(), _calls(part, times) as calls, model.quantization(weights=False, activations=False):
            part(example)
        for layer in part.layers:
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
    """Bytes of the parameters that are no weight of a quantized layer, all of them float."""
    quantized = [original_weight(module) for _, module, _ in model.weights()]
    quantizers = [m for m in model.model.modules() if isinstance(m, (FakeQuantize, BiasCorrection))]
    added = {id(p) for module in quantizers for p in module.parameters()}
    total = sum(p.numel() for p in model.model.parameters() if id(p) not in added)
    return 4 * (total - sum(weight.numel() for weight in quantized))


@contextmanager
def _calls(part: QuantizedGraph, times: int) -> Iterator[dict[str, list[Call]]]:
    """Collects the calls of every layer of a graph while it runs."""
    calls: dict[str, list[Call]] = {layer.name: [] for layer in part.layers}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name].append(Call(tuple(args[0].shape[1:]), tuple(output.shape[1:]), times))

    modules = {layer.name: part.model.get_submodule(layer.name) for layer in part.layers}
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _regions(model: Any) -> int:
    """Regions of one image that the heads of a two-stage detector look at when it is tested."""
    rpn = (getattr(model, 'test_cfg', None) or {}).get('rpn') or {}
    return int(rpn.get('max_per_img', REGIONS))
