"""Facts about a run: sizes, memory, versions."""

from __future__ import annotations

import platform
import resource
import sys
from importlib import metadata

import torch

from mmbrecq.byte_size import weight_bytes
from mmbrecq.kernels.native import kernel_state
from mmbrecq.mixed_precision.costs.layers import other_bytes
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.report.summary import ModelSize, PeakMemory
from mmbrecq.version import __version__

PACKAGES = (
    'torch', 'torchvision', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'mmpretrain', 'mmdet', 'onnx', 'onnxruntime',
    'openvino',
)  # fmt: skip


def versions() -> dict[str, str]:
    """Returns the versions of mmbrecq, Python and the packages that decide results, and the state of the kernels."""
    found = {'mmbrecq': __version__, 'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, 'kernels': kernel_state()}


def peak_memory() -> PeakMemory:
    """Returns the peak resident bytes of this process, and the peak allocated bytes on its GPU."""
    unit = 1 if sys.platform == 'darwin' else 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return PeakMemory(host=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, device=device)


def model_size(model: QuantizedModel) -> ModelSize:
    """Returns the bytes of a prepared model's parameters: all at 32 bits, and with quantized weights at their bits."""
    rest, quantizers = other_bytes(model), [fake_quant for _, _, fake_quant in model.weights()]
    packed = (weight_bytes(fq.codes.numel(), fq.scale.numel(), fq.qtype.bits, fq.qtype.symmetric) for fq in quantizers)
    return ModelSize(rest + 4 * sum(fq.codes.numel() for fq in quantizers), round(rest + sum(packed)))
