"""Latencies of layers as a runtime on this machine has them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mmbrecq.dependencies import require
from mmbrecq.deploy.backends import BaseBackend, ONNXRuntimeBackend, OpenVINOBackend
from mmbrecq.deploy.exporters.openvino import convert
from mmbrecq.errors import ConfigError, TableError
from mmbrecq.mixed_precision.costs.base import BaseCostModel
from mmbrecq.mixed_precision.costs.layer_graph import copies_of, layer_graph
from mmbrecq.mixed_precision.costs.layers import Bits, Call, LayerShape
from mmbrecq.progress import track
from mmbrecq.registry import COST_MODELS
from mmbrecq.runs.storage import write_text_atomic

FLOAT, INT8 = 'float', 'int8'
KINDS = (FLOAT, INT8)

RUNTIMES: dict[str, type[BaseBackend]] = {'openvino': OpenVINOBackend, 'onnxruntime': ONNXRuntimeBackend}


@COST_MODELS.register_module()
class MeasuredLatency(BaseCostModel):
    """Milliseconds of one image, each layer timed alone in a runtime on this machine.

    A layer is timed in float32 and with 8-bit integers, by its shape: layers of one shape share a figure, and a figure
    is measured once and kept in a file. Weights and inputs of fewer bits take the 8-bit kernels, since the runtimes
    have no others, and a layer with a float weight or a float input takes the float kernel. What stands between the
    layers is not counted.

    Args:
        runtime: ``openvino`` or ``onnxruntime``.
        path: File of the figures; None for one in the cache folder, named after runtime, version, processor and
            threads.
        num_threads: Threads of one inference.
        rounds: How often every layer is timed, each time by the median of many runs; the least of them counts, since
            what else the machine does adds time in spells, and takes none away.

    Raises:
        TableError: The file at ``path`` is of another runtime, version, processor or number of threads, or has a figure
            that no latency can be.
    """

    name, unit = 'latency', 'ms'

    def __init__(
        self, runtime: str = 'openvino', path: str | None = None, num_threads: int = 1, rounds: int = 10
    ) -> None:
        if runtime not in RUNTIMES:
            raise ConfigError(
                f'expected runtime of MeasuredLatency to be one of {sorted(RUNTIMES)}, but got {runtime!r}'
            )
        for name, value in {'num_threads': num_threads, 'rounds': rounds}.items():
            if type(value) is not int or value < 1:
                raise ConfigError(f'expected {name} of MeasuredLatency to be an integer >= 1, but got {value!r}')
        self.backend, self.num_threads, self.rounds = RUNTIMES[runtime], num_threads, rounds
        for package in ('onnx', self.backend.package):
            require(package)
        version = metadata.version(self.backend.package)
        self.origin = {'runtime': self.backend.name, 'version': version, 'cpu': cpu_name(), 'threads': num_threads}
        self.path = Path(path) if path is not None else _default_path(self.origin)
        self.figures: dict[str, dict[str, float]] = self._load() if self.path.exists() else {}

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        self.prepare([layer])
        kind = FLOAT if None in bits else INT8
        return sum(self.figures[shape_key(layer, call)][kind] for call in layer.calls)

    def prepare(self, layers: Sequence[LayerShape]) -> None:
        """Times the layers whose shapes have no figure, and keeps the figures in the file."""
        calls = {shape_key(layer, call): (layer, call) for layer in layers for call in layer.calls}
        missing = {key: calls[key] for key in calls if key not in self.figures}
        if not missing:
            return
        times: dict[tuple[str, str], list[float]] = {(key, kind): [] for key in missing for kind in KINDS}
        with tempfile.TemporaryDirectory() as folder:
            files = {
                (key, kind): self._write(Path(folder), layer, call, kind == INT8)
                for key, (layer, call) in missing.items()
                for kind in KINDS
            }
            # round by round, so that a busy spell of the machine falls on one round of many layers, not on one layer
            for key, kind in track([*times] * self.rounds, f'layers in {self.backend.name}'):
                layer, call = missing[key]
                example = torch.rand(call.times, *call.inputs) * 4 - 2
                spent = self.backend(files[key, kind], self.num_threads).seconds(example)
                times[key, kind].append(1e3 * spent / copies_of(layer, call))
        for key in missing:
            self.figures[key] = {kind: min(times[key, kind]) for kind in KINDS}
        content = {**self.origin, 'unit': 'ms', 'layers': self.figures}
        write_text_atomic(json.dumps(content, indent=1) + '\n', self.path)

    def _write(self, folder: Path, layer: LayerShape, call: Call, integer: bool) -> Path:
        """The file of a layer, in the form that the runtime reads."""
        import onnx

        stem = hashlib.sha256(shape_key(layer, call).encode()).hexdigest()[:16]
        path = folder / f'{stem}-{INT8 if integer else FLOAT}.onnx'
        onnx.save(layer_graph(layer, call, integer), str(path))
        if self.backend is OpenVINOBackend:
            import openvino

            openvino.save_model(convert(path), path.with_suffix('.xml'), compress_to_fp16=False)
            return path.with_suffix('.xml')
        return path

    def _load(self) -> dict[str, dict[str, float]]:
        try:
            content: Any = json.loads(self.path.read_text(encoding='utf-8'))
            rows = {str(key): {kind: row[kind] for kind in KINDS} for key, row in content['layers'].items()}
            origin = {key: content[key] for key in self.origin}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise TableError(
                f'{self.path}: expected latencies as MeasuredLatency keeps them, but got {error!r}'
            ) from error
        for key, value in self.origin.items():
            if origin[key] != value:
                raise TableError(
                    f'{self.path}: expected latencies of {key} {value!r}, but they are of {origin[key]!r}; remove the '
                    'file to measure them here'
                )
        for key, row in rows.items():
            for kind, value in row.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                    raise TableError(
                        f"{self.path}: expected the {kind} latency of '{key}' to be >= 0, but got {value!r}"
                    )
        return rows


def shape_key(layer: LayerShape, call: Call) -> str:
    """What a latency depends on, in words: layers that share it share their figure."""
    options = ', '.join(f'{name} {value}' for name, value in layer.options)
    sizes = ['x'.join(map(str, shape)) for shape in (layer.weight, (call.times, *call.inputs))]
    return f'{layer.kind} {sizes[0]} of {sizes[1]}' + (f' ({options})' if options else '')


def cpu_name() -> str:
    """Name of this machine's processor."""
    try:
        found = re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _default_path(origin: dict[str, Any]) -> Path:
    folder = Path(os.environ.get('MMBRECQ_CACHE') or Path.home() / '.cache' / 'mmbrecq')
    name = '-'.join(re.sub(r'[^A-Za-z0-9.]+', '_', str(value)).strip('_') for value in origin.values())
    return folder / 'latency' / f'{name}.json'
