"""Facts about a run: sizes, memory, versions."""

from __future__ import annotations

import platform
import resource
import sys
from importlib import metadata

import torch

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import BiasCorrection
from mmbrecq.fake_quants.weight import weight_fake_quant
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.report.summary import ModelSize, PeakMemory
from mmbrecq.version import __version__

PACKAGES = (
    'torch', 'torchvision', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'mmpretrain', 'mmdet', 'onnx', 'onnxruntime',
    'openvino',
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of mmbrecq, Python and the packages that decide results; those that are installed."""
    found = {'mmbrecq': __version__, 'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> PeakMemory:
    """Peak resident bytes of this process, and peak allocated bytes on its GPU."""
    unit = 1 if sys.platform == 'darwin' else 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return PeakMemory(host=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, device=device)


def model_size(model: QuantizedModel) -> ModelSize:
    """Bytes of the parameters: all at 32 bits, and with quantized weights at their bits.

    A quantized weight counts its packed bits, a float scale and, where the grid has one, a zero-point of its bits per
    channel; what is not quantized counts 32 bits.
    """
    saved = 0.0
    for layer in model.layers:
        fake_quant = weight_fake_quant(model.model.get_submodule(layer.name))
        if fake_quant is not None:
            bits = fake_quant.qtype.bits
            channel_bits = 32 + (0 if fake_quant.qtype.symmetric else bits)
            packed = fake_quant.codes.numel() * bits + fake_quant.scale.numel() * channel_bits
            saved += 4 * fake_quant.codes.numel() - packed / 8
    own = [m for m in model.model.modules() if isinstance(m, (FakeQuantize, BiasCorrection))]
    added = {id(p) for module in own for p in module.parameters()}
    total = 4 * sum(p.numel() for p in model.model.parameters() if id(p) not in added)
    return ModelSize(float=total, quantized=round(total - saved))
