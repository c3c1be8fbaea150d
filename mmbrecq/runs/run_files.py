"""The files that a run of quantization leaves in its work dir: what it has learned so far, and what came of it."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from torch import nn

from mmbrecq import pipeline
from mmbrecq.byte_size import weight_bytes
from mmbrecq.distributed import on_main
from mmbrecq.errors import CheckpointError, first_line
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.kernels.native import kernel_state
from mmbrecq.mixed_precision.costs.models import other_bytes
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.callbacks import Callback, Progress
from mmbrecq.reconstruction.results import FinishedUnit, UnitResult, unit_state
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.rehearsal import Rehearsal
from mmbrecq.report.html import write_report
from mmbrecq.report.rows import format_seconds
from mmbrecq.report.summary import ModelSize, PeakMemory, Summary
from mmbrecq.runs.identity import first_difference
from mmbrecq.runs.storage import save_atomic, write_text_atomic
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


class Journal(Callback):
    """Keeps ``reconstruction.pth``; each version is written beside the last one and renamed.

    Args:
        path: The file.
        model: Owner of all modules whose states are kept.
        identity: What the run depends on, each setting in words.
        config_text: The config, for a person to read.

    Attributes:
        units: What is done, by stage and name.
        metrics: What was measured, by name of the evaluation.
        observed: Images that are observed at once, None before that is planned.
        fallback: Overrides of a quantizer that the run has found itself, None before it has looked.
    """

    def __init__(self, path: Path, model: nn.Module, identity: Mapping[str, str], config_text: str) -> None:
        self.path, self.model, self.identity, self.config_text = path, model, dict(identity), config_text
        self.units: dict[tuple[str, str], FinishedUnit] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self.observed: int | None = None
        self.fallback: list[dict[str, str]] | None = None

    def load(self) -> bool:
        """Loads the file of an interrupted run in every process; returns False where there is none.

        Raises:
            CheckpointError: The file cannot be read, or is of another config, seed or float weights; what differs is
                named.
        """
        found = on_main(self._read)
        if found is None:
            return False
        self.units, self.metrics, self.observed, self.fallback = found
        return True

    def _read(self) -> tuple[Any, ...] | None:
        for partial in self.path.parent.glob(f'.{self.path.name}.*.partial'):
            # of a process that was killed while it wrote
            partial.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location='cpu', weights_only=True)
            meta = saved['meta']
            units = [FinishedUnit(UnitResult(**unit['result']), unit['state']) for unit in saved['units']]
            identity, metrics = dict(meta['identity']), dict(meta['metrics'])
        except Exception as error:
            raise CheckpointError(
                f'{self.path}: expected the state of an interrupted run, but it cannot be read: '
                f'{type(error).__name__}: {first_line(error)}'
            ) from error
        difference = first_difference(identity, self.identity)
        if difference is not None:
            raise CheckpointError(
                f'{self.path} is of another run: {difference}; go on as it was begun, or start again without --resume'
            )
        done = {(unit.result.stage, unit.result.name): unit for unit in units}
        return done, metrics, meta.get('observed'), meta.get('fallback')

    def after_unit(self, stage: Stage, unit: ReconstructionUnit, result: UnitResult, progress: Progress) -> None:
        self.units[result.stage, result.name] = FinishedUnit(result, unit_state(self.model, unit))
        self.save()

    @master_only
    def save(self) -> None:
        """Writes the file, in the first process; StorageError where that fails, and the version before stays."""
        units: list[Any] = [{'result': asdict(unit.result), 'state': unit.state} for unit in self.units.values()]
        meta = {
            'identity': self.identity, 'metrics': self.metrics, 'observed': self.observed, 'config': self.config_text,
            'units_done': list(self.units), 'fallback': self.fallback,
        }  # fmt: skip
        save_atomic({'units': units, 'meta': meta}, self.path)


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
