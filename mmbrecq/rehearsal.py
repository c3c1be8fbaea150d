"""Rehearses the whole sequence on a copy of a model and a few images, so that an obstacle is found within seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights, observing
from mmbrecq.deploy.backends.base import KernelCount
from mmbrecq.deploy.backends.factory import DeployedModel
from mmbrecq.deploy.comparison import Deviation, compare
from mmbrecq.deploy.exporters.base import BaseExporter
from mmbrecq.graph.shapes import stand_in
from mmbrecq.pipeline import copy_model, export, few_of, prepare
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.batches import UnitData
from mmbrecq.reconstruction.cache import CachePlan
from mmbrecq.reconstruction.callbacks import Forecast
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.optimize import optimize_unit
from mmbrecq.reconstruction.reconstructor import BaseReconstructor, unit_generator
from mmbrecq.reconstruction.results import load_unit_state, unit_state
from mmbrecq.reconstruction.stages import Task, stage_units


@dataclass(frozen=True)
class Rehearsal:
    """Holds the results of a rehearsal.

    Args:
        model: The packed copy that was exported.
        deviations: Deviations of each exported file from its simulation.
        kernels: Integer kernels by the name of the runtime.
        plan: Memory of a whole reconstruction and location of its cache; None without a forecast.
        seconds: Time of a whole reconstruction; None without a forecast.
    """

    model: QuantizedModel
    deviations: list[Deviation]
    kernels: dict[str, KernelCount]
    plan: CachePlan | None = None
    seconds: float | None = None


def rehearse(
    model: nn.Module,
    images: Tensor,
    quantizer: BRECQQuantizer,
    exporters: Sequence[BaseExporter],
    reconstructor: BaseReconstructor | None = None,
    count: int | None = None,
) -> Rehearsal:
    """Runs the pipeline on a copy and a few images, so that an obstacle is found within seconds.

    The copy is prepared, calibrated to the range of its values, rounded to nearest, exported, verified, opened in its
    runtime and compared with the simulation for one and for three images.

    Args:
        model: The float model; it stays as it is.
        images (Tensor): Preprocessed calibration images, of which four are used, or corners of large ones.
        quantizer: Decides grids and units.
        exporters: Write the files, which are removed again.
        reconstructor: Memory and time of its passes are forecast, the time from a few iterations of the first unit;
            None for no forecast.
        count: Number of calibration images that the forecast is for; None for that of ``images``.

    Raises:
        MMBrecqError: The model, the preset and the runtime are incompatible; the first obstacle is named.
    """
    count, images = len(images) if count is None else count, images[:4]
    quantized = prepare(copy_model(model), images, quantizer)
    few = few_of(images, len(images), quantized.image_graph.traced)
    observers: dict[str, dict[str, object]] = {kind: {'type': 'MinMaxObserver'} for kind in quantized.observers}
    rough = replace(quantized, observers=observers, equalization=0.0)
    calibrate_weights(rough)
    calibrate_activations(rough, [few])
    with torch.no_grad():
        for graph in rough.region_graphs:
            with graph.quantization(False, False), observing(rough, list(graph.quantizers.values())):
                graph(torch.rand_like(graph.traced.example))
    plan = seconds = None
    if reconstructor is not None:
        # only their number counts
        every = images[:1].expand(count, *images.shape[1:])
        plan = reconstructor.plan(Task(rough, every, list, None, 0, Path(tempfile.gettempdir())))
        seconds = _forecast(rough, images, reconstructor)
    rough.pack()
    deviations: list[Deviation] = []
    kernels: dict[str, KernelCount] = {}
    with tempfile.TemporaryDirectory(prefix='mmbrecq-') as folder:
        for exporter in exporters:
            paths = export(rough, exporter, few, Path(folder))
            deviations += compare(rough, paths, few)
            deployed = DeployedModel(rough.model, paths[0])
            kernels[deployed.name] = deployed.integer_kernels()
    return Rehearsal(rough, deviations, kernels, plan, seconds)


def _forecast(model: QuantizedModel, images: Tensor, reconstructor: BaseReconstructor, iterations: int = 4) -> float:
    """Returns the seconds of all passes, extrapolated from a few iterations of the first unit with weights."""
    graph, stage = model.image_graph, reconstructor.stages[0]
    unit = next(unit for unit in stage_units(graph, stage) if unit.layers)
    shapes = {node.name: node.meta['example'] for node in graph.traced.graph.nodes if 'example' in node.meta}
    values = {name: stand_in(shapes[name], images.device) for name in (*unit.inputs, *unit.outputs)}
    options = replace(stage.options, iterations=iterations)
    rows = torch.arange(options.batch_size) % len(images)
    quantized, floats, targets = ([values[name][rows % len(values[name])] for name in names] for names in (
        unit.inputs, unit.inputs, unit.outputs))  # fmt: skip
    data = UnitData(quantized, floats, targets)
    nearest = unit_state(model.model, unit)
    start = time.perf_counter()
    with graph.quantization(weights=True, activations=stage.quantizes_activations):
        optimize_unit(
            unit.name, unit.module, graph.unit_weights(unit), graph.unit_quantizers(unit), data, MSELoss(),
            replace(stage, options=options), unit_generator(0, stage.name, unit.name), images.device, lambda *_: None,
        )  # fmt: skip
    spent = time.perf_counter() - start
    load_unit_state(model.model, unit, nearest)
    return Forecast(model, reconstructor.stages, reconstructor.share_behind).total(
        stage, unit, spent * stage.options.iterations / iterations
    )
