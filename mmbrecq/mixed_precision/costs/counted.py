"""Costs that are counted: bytes and bit operations."""

from __future__ import annotations

from mmbrecq.byte_size import weight_bytes
from mmbrecq.mixed_precision.costs.base import BaseCostModel
from mmbrecq.mixed_precision.costs.layers import Bits, LayerShape
from mmbrecq.registry import COST_MODELS

FLOAT_BITS = 32


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
        weight_bits, activation_bits = bits
        return float(layer.macs * (weight_bits or FLOAT_BITS) * (activation_bits or FLOAT_BITS))
