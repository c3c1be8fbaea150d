"""The shapes of layers and of their calls, and cost models over them: bytes, bit operations, latencies."""

import json
import math
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.building import check_integer, check_number
from mmbrecq.byte_size import weight_bytes
from mmbrecq.errors import TableError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import BiasCorrection
from mmbrecq.fake_quants.weight import original_weight, weight_fake_quant
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel
from mmbrecq.registry import COST_MODELS
from mmbrecq.schema import decode

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


class BaseCostModel(metaclass=ABCMeta):
    """The cost of the bits of a network: a sum over its layers; budgets refer to it by its name."""

    name: str
    unit: str

    @abstractmethod
    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        """Returns the cost of one layer, for one image; ``bits`` are of its weight and of its input, None for float."""

    def prepare(self, layers: Sequence[LayerShape]) -> None:  # noqa: B027, most have nothing to prepare
        """Does at once what all layers of a network need before their costs are asked for; by default nothing."""

    def cost(self, layer: LayerShape, bits: Bits) -> float:
        """Returns the cost of one layer, see :meth:`layer_cost`; TableError where it is negative or not finite."""
        cost = float(self.layer_cost(layer, bits))
        if not 0 <= cost < math.inf:
            raise TableError(f"expected the {self.name} of layer '{layer.name}' at {show(bits)} to be >= 0, got {cost}")
        return cost


def show(bits: Bits) -> str:
    """Returns bits as tables name them: ``W4A8``, with 32 for float."""
    return f'W{bits[0] or FLOAT_BITS}A{bits[1] or FLOAT_BITS}'


def check_latencies(layers: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Raises TableError where a latency of a file is negative or not finite."""
    for name, row in layers.items():
        for kind, value in row.items():
            if not 0 <= value < math.inf:
                raise TableError(f"{path}: expected the {kind} latency of '{name}' to be >= 0, but got {value!r}")


@COST_MODELS.register_module()
class ModelSize(BaseCostModel):
    """Bytes of the weights, as ``summary.json`` counts them, see :func:`~mmbrecq.byte_size.weight_bytes`."""

    name, unit = 'size', 'bytes'

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        return weight_bytes(layer.weights, layer.scales, bits[0], layer.symmetric)


@COST_MODELS.register_module()
class BitOperations(BaseCostModel):
    """Multiplications times the bits of both factors, for one image (Li et al., ICLR 2021, and others)."""

    name, unit = 'bitops', 'bit operations'

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        return float(layer.macs * (bits[0] or FLOAT_BITS) * (bits[1] or FLOAT_BITS))


@COST_MODELS.register_module()
class LatencyTable(BaseCostModel):
    """Milliseconds of one image, layer by layer, from a file.

    It holds ::

        {"device": "...", "layers": {"backbone.conv1": {"W8A8": 0.12, "W4A8": 0.12, "W32A32": 0.31}, ...}}

    Args:
        path: The file; other keys than ``layers`` are for the reader.
    """

    name, unit = 'latency', 'ms'

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            content = decode(dict[str, Any], json.loads(Path(path).read_text(encoding='utf-8')), 'content')
            self.layers = decode(dict[str, dict[str, float]], content.get('layers'), 'layers')
        except (OSError, ValueError) as error:
            expected = "expected a JSON file with latencies by layer and bits under the key 'layers'"
            raise TableError(f'{path}: {expected}, but: {error}') from error
        check_latencies(self.layers, path)

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        row = self.layers.get(layer.name, {})
        if show(bits) not in row:
            expected = f"expected the latency of layer '{layer.name}' at {show(bits)}"
            raise TableError(f'{self.path}: {expected}, but the table has {", ".join(sorted(row)) or "nothing"} of it')
        return row[show(bits)]


@COST_MODELS.register_module()
@dataclass(frozen=True)
class BitSerialAccelerator(BaseCostModel):
    """Milliseconds of one image on an array of bit-serial multipliers, layer after layer.

    A layer takes the longest of three, each of which could hide the others::

        compute  = macs * weight_bits * activation_bits / (bit_operations_per_cycle * frequency)
        off-chip = (weight bytes + what of input and output does not fit on the chip) / off_chip_bandwidth
        on-chip  = (weight bytes + input bytes + output bytes) / on_chip_bandwidth

    plus ``overhead``. Bits are rounded up to a multiple of ``bit_granularity``, what is float counts 32; an output
    has the bits of the layer's input. It is a roofline, so it bounds the time from below.

    Args:
        bit_operations_per_cycle: Products of single bits that the array computes in a cycle; a 64 x 64 array of
            2 x 2 bit multipliers has 16,384.
        frequency: Cycles per second.
        off_chip_bandwidth: Bytes per second from memory.
        on_chip_bandwidth: Bytes per second from the buffer.
        on_chip_bytes: Size of the buffer; activations that fit stay there.
        bit_granularity: Bits that a multiplier takes at once.
        overhead: Seconds to start a layer.
    """

    name, unit = 'latency', 'ms'

    bit_operations_per_cycle: float = 16384
    frequency: float = 200e6
    off_chip_bandwidth: float = 4e9
    on_chip_bandwidth: float = 64e9
    on_chip_bytes: float = 1 << 20
    bit_granularity: int = 2
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for name in ('bit_operations_per_cycle', 'frequency', 'off_chip_bandwidth', 'on_chip_bandwidth'):
            check_number(getattr(self, name), '(0, inf)', f'{name} of an accelerator')
        for name in ('on_chip_bytes', 'overhead'):
            check_number(getattr(self, name), '[0, inf)', f'{name} of an accelerator')
        check_integer(self.bit_granularity, 1, 'bit_granularity')

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        granularity = self.bit_granularity
        weight_bits, activation_bits = (math.ceil((b or FLOAT_BITS) / granularity) * granularity for b in bits)
        compute = layer.macs * weight_bits * activation_bits / (self.bit_operations_per_cycle * self.frequency)
        off_chip = on_chip = layer.weights * weight_bits / 8
        for call in layer.calls:
            moved = [prod(shape) * activation_bits / 8 for shape in (call.inputs, call.outputs)]
            on_chip += sum(moved) * call.times
            off_chip += sum(max(part - self.on_chip_bytes, 0) for part in moved) * call.times
        traffic = max(off_chip / self.off_chip_bandwidth, on_chip / self.on_chip_bandwidth)
        return 1e3 * (max(compute, traffic) + self.overhead)
