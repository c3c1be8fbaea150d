"""Cost models: what the bits of every layer cost in bytes, operations or time."""

from mmbrecq.costs.accelerator import BitSerialAccelerator
from mmbrecq.costs.base import BaseCostModel
from mmbrecq.costs.counted import BitOperations, ModelSize
from mmbrecq.costs.latency_table import LatencyTable
from mmbrecq.costs.layers import Call, LayerShape, layer_shapes, other_bytes
from mmbrecq.costs.measured import MeasuredLatency

__all__ = [
    'BaseCostModel', 'BitOperations', 'BitSerialAccelerator', 'Call', 'LatencyTable', 'LayerShape', 'MeasuredLatency',
    'ModelSize', 'layer_shapes', 'other_bytes',
]  # fmt: skip
