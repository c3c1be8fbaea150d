"""Cost models: what the bits of every layer cost in bytes, operations or time."""

from mmbrecq.mixed_precision.costs.accelerator import BitSerialAccelerator
from mmbrecq.mixed_precision.costs.base import BaseCostModel
from mmbrecq.mixed_precision.costs.counted import BitOperations, ModelSize
from mmbrecq.mixed_precision.costs.latency_table import LatencyTable
from mmbrecq.mixed_precision.costs.layers import Call, LayerShape, layer_shapes, other_bytes
from mmbrecq.mixed_precision.costs.measured import MeasuredLatency

__all__ = [
    'BaseCostModel', 'BitOperations', 'BitSerialAccelerator', 'Call', 'LatencyTable', 'LayerShape', 'MeasuredLatency',
    'ModelSize', 'layer_shapes', 'other_bytes',
]  # fmt: skip
