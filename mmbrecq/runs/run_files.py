"""The files that a run of quantization leaves in its work dir, and what they say about it: sizes, memory, versions."""

import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only

from mmbrecq import pipeline
from mmbrecq.byte_size import weight_bytes
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.kernels.native import kernel_state
from mmbrecq.mixed_precision.costs.layers import other_bytes
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.callbacks import Callback, Progress
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.rehearsal import Rehearsal
from mmbrecq.report.html import write_report
from mmbrecq.report.rows import format_seconds
from mmbrecq.report.summary import ModelSize, PeakMemory, Summary
from mmbrecq.runs.storage import write_text_atomic
from mmbrecq.schema import save_json
from mmbrecq.version import __version__

PACKAGES = (
    'torch', 'torchvision', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite', 'mmpretrain', 'mmdet', 'onnx', 'onnxruntime',
    'openvino',
)  # fmt: skip


@dataclass
class RunFiles(Callback):
    """Writes the files of a work dir, in the first process; each is written whole or stays as it was.

    The summary and the report have every finished unit, so that they can be read half-way through a run.
    """

    folder: Path
    summary: Summary
    config_text: str

    @master_only
    def write_summary(self) -> None:
        """Writes ``summary.json`` and ``report.html``."""
        save_json(self.summary, self.folder / 'summary.json')
        write_report(self.summary, self.folder / 'report.html', time.strftime('%Y-%m-%d'))

    def after_unit(self, stage: Stage, unit: ReconstructionUnit, result: UnitResult, progress: Progress) -> None:
        self.summary.add_unit(result)
        self.write_summary()

    @master_only
    def write_inputs(self, model: QuantizedModel, ids: Sequence[str]) -> None:
        """Writes the first files, once config, checkpoint and images are known to be good.

        Until here the files of an earlier run stay as they are.
        """
        if self.summary.config:
            write_text_atomic(self.config_text, self.folder / Path(self.summary.config).name)
        write_text_atomic(layer_list(model), self.folder / 'layers.txt')
        write_text_atomic('\n'.join(ids) + '\n', self.folder / 'calibration_ids.txt')
        self.summary.calibration.num_samples = len(ids)
        self.summary.calibration.ids_file = 'calibration_ids.txt'
        self.write_summary()

    @master_only
    def write_checkpoint(self, model: QuantizedModel, quantizer: Mapping[str, Any]) -> None:
        """Writes ``quantized.pth`` of a packed model."""
        pipeline.save(
            model, self.folder / 'quantized.pth', quantizer, config=self.config_text, seed=self.summary.seed,
            versions=self.summary.versions, calibration_ids_file=self.summary.calibration.ids_file,
        )  # fmt: skip


def layer_list(model: QuantizedModel) -> str:
    """Returns a line for every convolution and linear layer: bits, unit, or why it stayed in float."""
    width = max(len(layer.name) for layer in model.layers)
    lines = []
    for layer in model.layers:
        bits = f'W{layer.weight_bits or 32}A{layer.activation_bits or 32}'
        tail = f'float: {layer.float_reason}' if layer.float_reason else f'unit {layer.unit}'
        lines.append(f'{layer.name:<{width}}  {layer.kind:<12}  {bits:<7}  {tail}')
    return '\n'.join(lines) + '\n'


def rehearsal_text(found: Rehearsal) -> str:
    """Returns what a dry run prints: layers, units, integer kernels, memory and time."""
    units = [unit for graph in found.model.graphs for unit in graph.units if unit.is_quantized]
    lines = [layer_list(found.model), f'{len(units)} units: {", ".join(unit.name for unit in units)}']
    lines += [
        f'{path} stays one call: {why}' for graph in found.model.graphs for path, why in graph.traced.opaque.items()
    ]
    lines += map(str, found.deviations)
    lines += [count.describe(runtime) for runtime, count in found.kernels.items()]
    lines += [str(found.plan)] if found.plan is not None else []
    if found.seconds is not None:
        lines.append(f'the reconstruction will take about {format_seconds(found.seconds)} on this machine')
    return '\n'.join(lines)


def versions() -> dict[str, str]:
    """Returns the versions of mmbrecq, Python and the packages that decide results, and the state of the kernels."""
    found = {'mmbrecq': __version__, 'python': platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
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
