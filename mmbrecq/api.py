"""Quantizes any ``nn.Module`` in Python: :func:`quantize` and :func:`load`.

Example:
    >>> import torch, mmbrecq
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
    >>> images = torch.rand(16, 3, 16, 16)
    >>> quantized = mmbrecq.quantize(model, images, weight_bits=4, method='brecq', iterations=20)
    >>> tuple(quantized(images).shape)
    (16, 8, 12, 12)
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq import pipeline
from mmbrecq.building import build, expect
from mmbrecq.deploy.comparison import Deviation, compare
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.deploy.exporters.base import BaseExporter
from mmbrecq.errors import DataError, ExportError, GraphError, NonFiniteError
from mmbrecq.presets import get_preset
from mmbrecq.quantizers.quantized_model import LayerInfo, QuantizedModel
from mmbrecq.reconstruction.callbacks import Callback, Callbacks
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Task
from mmbrecq.registry import QUANTIZERS, RECONSTRUCTORS
from mmbrecq.rehearsal import rehearse
from mmbrecq.runs.checkpoint import read_checkpoint

METHODS: dict[str, tuple[str, str, dict[str, int]]] = {
    'brecq': ('AdaRound', 'BRECQReconstructor', {'weights': 1, 'activations': 4}),
    'qdrop': ('StraightThrough', 'QDropReconstructor', {'joint': 1}),
    'nearest': ('NearestRounding', 'NearestReconstructor', {}),
}
"""How each method rounds weights (with few iterations straight-through gradients get further), its reconstructor, and
the divisors of the iterations of its passes."""

EXPORTERS: dict[str, type[BaseExporter]] = {'.onnx': ONNXExporter, '.xml': OpenVINOExporter}
TARGETS = {'openvino': '.xml', 'onnxruntime': '.onnx', 'tensorrt': '.onnx'}
"""The format in which the rehearsal of each preset exports; ``academic`` has no target."""


class Quantized:
    """Holds a quantized model that :func:`quantize` or :func:`load` returned.

    Attributes:
        model (QuantizedModel): The packed model with its graphs.
        quantizer (dict): Config of the quantizer that prepared it.
        results (list[UnitResult]): Results of each reconstructed unit and pass.
        deviations (list[Deviation]): Deviations of the last exported file from the simulation.
    """

    def __init__(self, model: QuantizedModel, quantizer: Mapping[str, Any], results: Sequence[UnitResult] = ()) -> None:
        self.model, self.quantizer, self.results = model, dict(quantizer), list(results)
        self.deviations: list[Deviation] = []
        self._example = model.image_graph.traced.example

    @property
    def layers(self) -> list[LayerInfo]:
        """Bits and unit of every convolution and linear layer, or the reason why it stayed in float."""
        return self.model.layers

    def __call__(self, images: Tensor) -> Any:
        """Computes the simulated outputs of preprocessed images, ``(N, C, H, W)``, as the float model returns them."""
        with torch.no_grad():
            return self.model(images)

    def export(self, path: str | Path, images: Tensor | None = None, opset: int = 17) -> list[Path]:
        """Writes the model as ``.onnx`` or ``.xml``, verifies the file, and compares it with the simulation.

        Args:
            path: The file; its suffix decides the format.
            images (Tensor): Preprocessed images to compare with; by default those that the model was traced with.
            opset: ONNX operator set.

        Returns:
            The paths of the files, one for each graph.

        Raises:
            ExportError: The suffix is unknown, the graph has no form in the format, breaks a rule of its preset, or
                computes something else in the runtime.
        """
        path = Path(path)
        if path.suffix not in EXPORTERS:
            raise ExportError(f'expected a file ending in {" or ".join(EXPORTERS)}, but got {path}')
        exporter = EXPORTERS[path.suffix](path.name, opset)
        paths = pipeline.export(self.model, exporter, self._example, path.parent)
        self.deviations = compare(self.model, paths, self._example if images is None else images)
        return paths

    def save(self, path: str | Path) -> None:
        """Writes the integers, scales and biases, and the options with which :func:`load` prepares the float model."""
        pipeline.save(self.model, Path(path), self.quantizer)


def quantize(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    preset: str = 'openvino',
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    method: str = 'brecq',
    iterations: int | None = None,
    seed: int = 0,
    quantizer: Mapping[str, Any] | None = None,
    reconstructor: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Quantized:
    """Quantizes a model for a target.

    The model is prepared and rehearsed first: a copy is rounded to nearest, exported, verified, and compared in its
    runtime, so that an operation that the target lacks is an error within seconds.

    Args:
        model: A float model that computes with tensors; it is not changed.
        images: Preprocessed calibration images, ``(N, C, H, W)``, or an iterable of batches of them; the first item of
            a batch that is a tuple or a list.
        preset: ``openvino``, ``onnxruntime``, ``tensorrt`` or ``academic``.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8; None leaves activations in float.
        method: ``brecq`` reconstructs weights, then activations; ``qdrop`` both together, with straight-through
            rounding; ``nearest`` rounds to nearest and corrects biases.
        iterations: Iterations of each unit in the first pass; the second pass of ``brecq`` has a quarter. None for the
            defaults, 20,000 and 5,000.
        seed: Seed of all random draws.
        quantizer: More options of :class:`~mmbrecq.quantizers.BRECQQuantizer`.
        reconstructor: More options of the reconstructor.
        callbacks: Callbacks that observe every unit.

    Raises:
        ConfigError: An option is unknown or out of range.
        DataError: There are no images, or images of several sizes.
        GraphError: The model cannot be traced, or has heads that read regions.
        ExportError: The target cannot run the model.

    Example:
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(4, 3, 8, 8)
        >>> quantized = quantize(model, images, weight_bits=4, method='nearest', quantizer={'first_last_8bit': False})
        >>> quantized.layers[0].weight_bits
        4
    """
    expect(method in METHODS, f'method to be one of {list(METHODS)}', method)
    options = _quantizer_config(preset, weight_bits, activation_bits, method, quantizer)
    build(QUANTIZERS, options)
    reconstruction = _reconstructor(method, iterations, reconstructor)
    tensor = collect(images, next(iter(model.parameters()), torch.empty(0)).device)
    diagnosis = pipeline.find_fallback(model, tensor, options)
    if diagnosis is not None:
        options['overrides'] = [*options.get('overrides', ()), *diagnosis.overrides()]
    builder = build(QUANTIZERS, options)
    if preset in TARGETS:
        rehearse(model, tensor, builder, [EXPORTERS[TARGETS[preset]]()])
    quantized = pipeline.prepare(pipeline.copy_model(model), tensor, builder)
    if quantized.region_graphs:
        raise GraphError(
            f'expected a model whose outputs follow from its images, but {type(model).__name__} has heads that read '
            'regions: quantize it by a config and tools/ptq.py'
        )
    results: list[UnitResult] = []
    with tempfile.TemporaryDirectory(prefix='mmbrecq-') as folder:
        task = Task(quantized, tensor, list, None, seed, Path(folder))
        plan = reconstruction.plan(task)
        pipeline.calibrate(task, plan.observed)
        for _, done in pipeline.reconstruct(task, reconstruction, plan, Callbacks(callbacks)):
            results += done
    pipeline.pack(quantized)
    return Quantized(quantized, options, results)


def load(path: str | Path, model: nn.Module) -> Quantized:
    """Loads a file of :meth:`Quantized.save` or ``tools/ptq.py``.

    Args:
        path: The file.
        model: The float model, its weights do not matter; it is not changed.

    Raises:
        CheckpointError: The file is no quantized checkpoint, or of another model.
    """
    quantized = pipeline.load(pipeline.copy_model(model), path, own_bits=True)
    config = read_checkpoint(str(path))['meta']['quantizer']
    return Quantized(quantized, config)


def collect(images: Tensor | Iterable[Any], device: torch.device) -> Tensor:
    """Returns calibration images as one tensor ``(N, C, H, W)`` on ``device``.

    Raises:
        DataError: There are no images, they are no tensors, or they differ in shape.
        NonFiniteError: A value is NaN or infinite.
    """
    batches = [images] if isinstance(images, Tensor) else [b[0] if isinstance(b, (tuple, list)) else b for b in images]
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() < 2 or batch.shape[1:] != batches[0].shape[1:]:
            found = f'{tuple(batch.shape)}' if isinstance(batch, Tensor) else f'a {type(batch).__name__}'
            raise DataError(f'expected batches of images of one size, (N, C, H, W), but got {found}')
    if not sum(map(len, batches)):
        raise DataError('expected calibration images, but got none')
    joined = torch.cat([batch.detach() for batch in batches]).to(device)
    if not bool(torch.isfinite(joined).all()):
        raise NonFiniteError('expected finite pixels, but got NaN or infinity among the calibration images')
    return joined


def _quantizer_config(
    preset: str, weight_bits: int, activation_bits: int | None, method: str, more: Mapping[str, Any] | None
) -> dict[str, Any]:
    get_preset(preset)
    given = dict(more or {})
    weight = {'bits': weight_bits, 'rounding': {'type': METHODS[method][0]}, **given.pop('weight', {})}
    activation = None
    if activation_bits is not None:
        activation = {'bits': activation_bits, **(given.pop('activation', None) or {})}
    return {'type': 'BRECQQuantizer', 'weight': weight, 'activation': activation, 'preset': preset, **given}


def _reconstructor(method: str, iterations: int | None, more: Mapping[str, Any] | None) -> Any:
    given = dict(more or {})
    _, kind, passes = METHODS[method]
    for name, divisor in passes.items():
        if iterations is not None:
            given[name] = {'iterations': max(1, iterations // divisor), **given.get(name, {})}
    return build(RECONSTRUCTORS, {'type': kind, **given})
