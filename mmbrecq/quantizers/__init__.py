"""Quantizers: from a float model and a config to a model whose every layer knows its grid."""

from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import LayerInfo, QuantizedGraph, QuantizedModel

__all__ = ['BRECQQuantizer', 'LayerInfo', 'QuantizedGraph', 'QuantizedModel']
