"""Cost models: what the bits of every layer cost in bytes, operations or time."""

from mmbrecq.mixed_precision.costs.layers import Call, LayerShape, layer_shapes, other_bytes
from mmbrecq.mixed_precision.costs.measured import MeasuredLatency
from mmbrecq.mixed_precision.costs.models import (
    BaseCostModel,
    BitOperations,
    BitSerialAccelerator,
    LatencyTable,
    ModelSize,
)

__all__ = [
    'BaseCostModel', 'BitOperations', 'BitSerialAccelerator', 'Call', 'LatencyTable', 'LayerShape', 'MeasuredLatency',
    'ModelSize', 'layer_shapes', 'other_bytes',
]  # fmt: skip
