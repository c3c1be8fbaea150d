"""Costs that are counted: bytes and bit operations."""

from __future__ import annotations

from mmbrecq.mixed_precision.costs.base import BaseCostModel
from mmbrecq.mixed_precision.costs.layers import Bits, LayerShape
from mmbrecq.registry import COST_MODELS

FLOAT_BITS = 32


@COST_MODELS.register_module()
class ModelSize(BaseCostModel):
    """Bytes of the weights, as ``summary.json`` counts them: packed bits, a float scale per channel, zero-points."""

    name, unit = 'size', 'bytes'

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        weight_bits, _ = bits
        if weight_bits is None:
            return layer.weights * FLOAT_BITS / 8
        per_scale = FLOAT_BITS + (0 if layer.symmetric else weight_bits)
        return (layer.weights * weight_bits + layer.scales * per_scale) / 8


@COST_MODELS.register_module()
class BitOperations(BaseCostModel):
    """Multiplications times the bits of both factors, for one image (Li et al., ICLR 2021, and others)."""

    name, unit = 'bitops', 'bit operations'

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        weight_bits, activation_bits = bits
        return float(layer.macs * (weight_bits or FLOAT_BITS) * (activation_bits or FLOAT_BITS))
