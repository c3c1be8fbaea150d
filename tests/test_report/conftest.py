"""A finished W2A4 run of a small ResNet, and runs that stopped half-way."""

from __future__ import annotations

import pytest

from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.report.summary import (
    Calibration,
    KernelCount,
    LayerBits,
    Metrics,
    ModelSize,
    PeakMemory,
    Seconds,
    Summary,
)


@pytest.fixture
def summary() -> Summary:
    """Values differ from each other, so that a mixed-up pair shows."""
    return Summary(
        config='configs/brecq/resnet/resnet18_brecq-w2a4.py',
        model='ResNet-18',
        preset='openvino',
        seed=7,
        versions={'mmbrecq': '0.1.0', 'torch': '2.11.0'},
        metrics=Metrics(
            float={'accuracy/top1': 82.0, 'accuracy/top5': 98.5},
            nearest={'accuracy/top1': 12.34, 'accuracy/top5': 54.321},
            weights={'accuracy/top1': 81.5, 'accuracy/top5': 98.25},
            quantized={'accuracy/top1': 81.02, 'accuracy/top5': 98.0},
            deployed={
                'ONNX Runtime': {'accuracy/top1': 81.01, 'accuracy/top5': 98.01},
                'OpenVINO': {'accuracy/top1': 81.04, 'accuracy/top5': 98.02},
            },
        ),
        seconds=Seconds(prepare=2.0, calibrate=8.0, reconstruct=190.0, evaluate=30.0, export=5.0, total=240.0),
        peak_memory_bytes=PeakMemory(host=1_240_000_000, device=None),
        model_size_bytes=ModelSize(float=11_200_000, quantized=832_000),
        units=[
            UnitResult('backbone.conv1', 'weights', ('backbone.conv1',), 0.5, 0.05, 2000, 12.5, False, 2.0),
            UnitResult('backbone.layer1.0', 'weights', ('backbone.layer1.0.conv1',), 0.02, 0.03, 2000, 9.5, True, 1.0),
            UnitResult('backbone.conv1', 'activations', ('backbone.conv1',), 0.4, 0.3, 500, 3.5, False, 0.0),
        ],
        bits={
            'backbone.conv1': LayerBits(8, 4),
            'backbone.layer1.0.conv1': LayerBits(2, 4),
            'backbone.layer1.0.conv2': LayerBits(2, None),
        },
        float_layers=['head.aux: excluded by a pattern: head.*'],
        calibration=Calibration(1024, 'calibration_ids.json'),
        warnings=['No kernel below 8 bits.'],
        verify={'deploy/model.onnx': 'passed', 'deploy/model.xml': 'V3: relu_4'},
        integer_kernels={'ONNX Runtime': KernelCount(3, 3), 'OpenVINO': KernelCount(3, 2)},
    )
