"""Prepares a float model for quantization by a config."""

from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import LayerInfo, QuantizedGraph, QuantizedModel

__all__ = ['BRECQQuantizer', 'LayerInfo', 'QuantizedGraph', 'QuantizedModel']
