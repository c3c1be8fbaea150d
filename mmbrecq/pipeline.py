"""Runs post-training quantization, one function for each phase; each can be used alone.

    prepare -> check -> calibrate -> reconstruct -> pack -> export -> compare

``tools/ptq.py``, :func:`mmbrecq.quantize`, the analysis of sensitivities and the benchmarks call these functions.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmbrecq.building import build
from mmbrecq.calibration.calibrator import OBSERVED, calibrate_activations, calibrate_regions, calibrate_weights
from mmbrecq.calibration.equalization import equalize, equalize_parts
from mmbrecq.data.groups import Images, batches_of, grouped
from mmbrecq.data.images import example_of
from mmbrecq.deploy.exporters.base import BaseExporter
from mmbrecq.distributed import batch_number, copy_from_main
from mmbrecq.errors import CheckpointError, GraphError, PatternError, first_line
from mmbrecq.graph.components import RegionForward, region_heads, region_shape
from mmbrecq.graph.equality import check_equality, full_float32, take_reference
from mmbrecq.graph.symbolic import tensors_in
from mmbrecq.graph.traced_graph import TracedGraph, smaller
from mmbrecq.mixed_precision.diagnosis import Diagnosis, GridLosses, diagnose, find_raised, measure_grids
from mmbrecq.mixed_precision.sensitivity.measure import OutputLoss, output_loss
from mmbrecq.progress import track
from mmbrecq.qtype import MAX_BITS
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.options import FLOAT, with_bits
from mmbrecq.quantizers.quantized_model import UNCALLED, QuantizedGraph, QuantizedModel
from mmbrecq.reconstruction.cache import CachePlan
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, Task
from mmbrecq.registry import QUANTIZERS
from mmbrecq.runs.checkpoint import check_grids, grids_of, load_quantized_checkpoint, read_checkpoint
from mmbrecq.runs.storage import save_atomic

LOOKED_AT = 2**21, 2**29
"""Pixels of all images that a diagnosis looks at, 16 of 362 x 362, and values that the model computes of them."""

CORNER = 320
"""Rows and columns, at least, of the corners of large images that stand for these."""


def copy_model(model: nn.Module) -> nn.Module:
    """Returns a copy in evaluation mode; what its modules keep of earlier calls, gradients included, is detached.

    Raises:
        GraphError: Something in the model has no copy.
    """
    kept = [v for module in model.modules() for v in tensors_in(vars(module)) if not v.is_leaf]
    try:
        copied = _uncompiled(copy.deepcopy(model, {id(value): value.detach().clone() for value in kept}))
        # the backbones of OpenMMLab return nothing
        copied.eval()
    except Exception as error:
        raise GraphError(f'expected a model that can be copied, but got: {first_line(error)}') from error
    return copied


def _uncompiled(module: nn.Module) -> nn.Module:
    """Returns the module that ``torch.compile`` has wrapped, or the module itself; those within are replaced so."""
    module = dict(module.named_children()).get('_orig_mod', module)
    for name, child in list(module.named_children()):
        if _uncompiled(child) is not child:
            setattr(module, name, _uncompiled(child))
    return module


@full_float32()
def prepare(model: nn.Module, images: Images, quantizer: BRECQQuantizer) -> QuantizedModel:
    """Traces a model, inserts its quantizers, and checks that the graph computes the model's outputs.

    Args:
        model: A float model; it is changed in place.
        images: Preprocessed images, ``(N, C, H, W)``, or groups of them; one is repeated.
        quantizer: Decides grids and units.

    Returns:
        The quantized model, its grids still to be calibrated, its quantization switched off.

    Raises:
        GraphError: The model cannot be traced, or its graph computes something else; the first layer is named.

    Example:
        >>> from mmbrecq.quantizers import BRECQQuantizer
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(4, 3, 8, 8)
        >>> prepared = prepare(model, images, BRECQQuantizer({'bits': 4, 'rounding': {'type': 'NearestRounding'}}))
        >>> calibrate_weights(prepared)
        >>> pack(prepared)
        >>> tuple(prepared(images).shape)
        (4, 4, 6, 6)
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise GraphError(f'expected modules of Python, but got {path or "the model"} compiled by TorchScript')
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise GraphError(f'expected initialised weights, but {path} gets its own in the first pass of the model')
        if any(map(iskeyword, path.split('.'))):
            raise GraphError(f'expected names of modules that are no words of Python, but got {path}')
    example = example_of(images)
    references = [take_reference(model, example)]
    for head in region_heads(model):
        features = torch.rand(2, *region_shape(model, head), generator=torch.Generator().manual_seed(0))
        references.append(take_reference(model, features.to(example.device), RegionForward(model, head.path)))
    quantized = quantizer.prepare(model, example)
    for graph, reference in zip(quantized.graphs, references, strict=True):
        with quantized.quantization(weights=False, activations=False):
            check_equality(graph, reference, graph.traced.free_size)
    return quantized


def find_fallback(model: nn.Module, images: Images, config: Mapping[str, Any]) -> Diagnosis | None:
    """Finds the layers whose input hurts the outputs, at 8 bits or fewer, on copies of the model and a few images.

    Args:
        model: The float model; it stays as it is.
        images: Preprocessed calibration images, ``(N, C, H, W)``, or groups of them; a few of the first are looked at.
        config: Config of the quantizer, whose ``fallback`` has the bounds and the limit.

    Returns:
        The losses, the layers to leave in float, and those to give 8 bits; None where the config asks for neither.

    Raises:
        GraphError: The model cannot be prepared, see :func:`prepare`.
    """
    quantizer: BRECQQuantizer = build(QUANTIZERS, dict(config))
    options = quantizer.fallback
    bits, found = quantizer.activation_bits, None
    if bits is not None and options.limit:
        graph, loss = _losses_of_copy(model, images, with_bits(config, MAX_BITS), options.images)
        found = diagnose(graph, lambda paths: loss.of((), paths), loss.kind, options)
    if bits is not None and bits < MAX_BITS and options.low_bound is not None:
        overrides = [*config.get('overrides', ()), *(found.overrides() if found else ())]
        graph, loss = _losses_of_copy(model, images, {**config, 'overrides': overrides}, min(options.images, 4))
        raised = find_raised(graph, lambda paths: loss.of((), paths), options)
        if raised:
            found = found or Diagnosis(loss.kind)
            found.raised = raised
    return found


def _losses_of_copy(
    model: nn.Module, images: Images, config: Mapping[str, Any], count: int
) -> tuple[QuantizedGraph, OutputLoss]:
    found = _calibrated_copy(model, images, config, count)
    return found.model.image_graph, output_loss(found, found.model.image_graph, None, '')


def find_grid_losses(model: nn.Module, images: Images, config: Mapping[str, Any], count: int = 16) -> GridLosses:
    """Measures what every single grid costs the outputs, on a copy of the model and the first images.

    Args:
        model: The float model; it stays as it is.
        images: Preprocessed calibration images, ``(N, C, H, W)``, or groups of them.
        config: Config of the quantizer, which decides the bits.
        count: Most images to look at; large ones are fewer.

    Raises:
        GraphError: The model cannot be prepared, see :func:`prepare`.
    """
    found = _calibrated_copy(model, images, config, count)
    calibrate_weights(found.model)
    return grid_losses(found)


def grid_losses(task: Task, passes: int | None = None) -> GridLosses:
    """Measures what single grids of a calibrated model cost its outputs over the images of a task.

    Args:
        task: The model, its grids calibrated, and a few images.
        passes: See :func:`~mmbrecq.mixed_precision.diagnosis.measure_grids`.
    """
    graph = task.model.image_graph
    return measure_grids(graph, output_loss(task, graph, None, ''), len(task.images), passes)


def few_of(images: Images, count: int, traced: TracedGraph) -> Tensor:
    """Returns the first images of the first group, or corners of large ones if the model runs at any size.

    They are fewer where they are large, or the model computes much of them, see :data:`LOOKED_AT`.
    """
    group: Tensor = grouped(images).parts[0][:count]
    if traced.free_size:
        group = smaller(group, CORNER)
    pixels, values = LOOKED_AT
    values_of_one = traced.volume * group[0].numel() / traced.example[0].numel()
    return group[: max(2, min(pixels // group[0, :1].numel(), int(values / values_of_one)))].contiguous()


def _calibrated_copy(model: nn.Module, images: Images, config: Mapping[str, Any], count: int) -> Task:
    """Returns a prepared copy of a model, the activations of its images calibrated, with the images looked at."""
    rough = prepare(copy_model(model), images, build(QUANTIZERS, dict(config)))
    few = few_of(images, count, rough.image_graph.traced)

    def run() -> None:
        rough.image_graph(few)

    equalize(rough, rough.image_graph, run)
    calibrate_activations(rough, [few])
    return Task(rough, few, list, None, 0, Path(tempfile.gettempdir()))


def calibrate(task: Task, at_once: int = OBSERVED, first_batch: int = 0, activations: bool = True) -> int:
    """Finds the grid of every weight and activation; channels are equalised before, where the quantizer says so.

    Args:
        task: The prepared model and its images.
        at_once: Images that are observed at once.
        first_batch: Number of the first batch that heads of regions are run on, among those of all processes.
        activations: Whether activations get their grids, too.

    Returns:
        The number of groups of values whose channels were equalised.

    Raises:
        NonFiniteError: A weight or an activation is not finite.
    """
    model = task.model
    count = equalize_parts(model, task.images, task.regions, at_once, first_batch)
    calibrate_weights(model)
    if activations:
        batches = batches_of(task.images, at_once, task.first)
        images = (task.images[batch] for batch in track(batches, 'calibration'))
        calibrate_activations(model, images, batch_number(task.first, at_once, grouped(task.images).ends))
        calibrate_regions(model, task.regions, first_batch)
    copy_from_main(model.model)
    return count


def reconstruct(
    task: Task, reconstructor: BaseReconstructor, plan: CachePlan, callback: Callback
) -> Iterator[tuple[Stage, list[UnitResult]]]:
    """Reconstructs all units, and yields each pass with its results, see :meth:`BaseReconstructor.passes`."""
    yield from reconstructor.passes(task, plan, callback)


def pack(model: QuantizedModel) -> None:
    """Replaces float weights by integers; the model computes its quantized outputs from then on."""
    model.pack()


def export(model: QuantizedModel, exporter: BaseExporter, images: Tensor, folder: Path) -> list[Path]:
    """Writes a packed model, one file for each graph, and verifies each against the rules of the preset.

    Args:
        model: The packed model.
        exporter: Writes the files.
        images (Tensor): Preprocessed images, of which two are traced.
        folder: Made where it is missing.

    Raises:
        ExportError: A graph has no form in the file's format, or breaks a rule.
    """
    return exporter.export_all(model, example_of(images), folder)


def save(model: QuantizedModel, path: Path, quantizer: Mapping[str, Any], **meta: Any) -> None:
    """Writes a packed model as a checkpoint that :func:`load` reads.

    Args:
        model: The packed model.
        path: The file.
        quantizer: Config of the quantizer that prepared it.
        **meta: More facts to keep in the file's ``meta``.
    """
    meta = {
        'quantizer': _plain(quantizer),
        'bits': {n.name: [n.weight_bits, n.activation_bits] for n in model.layers if n.float_reason != UNCALLED},
        'grids': grids_of(model.model),
        'example_shape': list(model.image_graph.traced.example.shape),
        **meta,
    }
    save_atomic({'state_dict': model.model.state_dict(), 'meta': meta}, path)


def _plain(value: Any) -> Any:
    """Returns a config as plain values, which a checkpoint can hold; a type becomes its registered name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.__name__ if isinstance(value, type) else value


def load(
    model: nn.Module, path: str | Path, quantizer: Mapping[str, Any] | None = None, own_bits: bool = False
) -> QuantizedModel:
    """Turns a float model into the quantized one that a checkpoint holds.

    Args:
        model: The float model; it is changed in place.
        path: A file of :func:`save`.
        quantizer: Config of the quantizer; None for the one that the file names.
        own_bits: Whether layers have the bits that the file names instead of the config's.

    Raises:
        CheckpointError: The file is no quantized checkpoint, or of another model or quantizer.
    """
    meta = read_checkpoint(path).get('meta', {})
    shape, grids = meta.get('example_shape'), meta.get('grids')
    own = meta.get('quantizer')
    if quantizer is not None and own is not None:
        # a config does not name what a run has left in float
        fallback = [override for override in own.get('overrides', ()) if override.get('reason')]
        own = {**quantizer, 'overrides': [*quantizer.get('overrides', ()), *fallback]}
    quantizer = own
    if shape is None or grids is None or quantizer is None:
        raise CheckpointError(f'{path}: expected a checkpoint written by tools/ptq.py, but it names no grids')
    example = torch.zeros(shape, device=next(model.parameters()).device)
    if own_bits:
        bits = [
            {'pattern': name, 'weight_bits': weight or FLOAT, 'activation_bits': activation or FLOAT}
            for name, (weight, activation) in meta['bits'].items()
        ]
        quantizer = {**quantizer, 'overrides': bits}
    try:
        quantized: QuantizedModel = build(QUANTIZERS, dict(quantizer)).prepare(model, example)
    except PatternError as error:
        raise CheckpointError(f'{path} does not fit the model: {error}') from error
    quantized.pack()
    load_quantized_checkpoint(model, path)
    check_grids(model, grids, str(path))
    return quantized
