"""What the activations of every group lose at a number of bits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_regions
from mmbrecq.mixed_precision.sensitivity.measure import BATCH, FISHER, output_loss
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.progress import track
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.reconstruction.task import Task


def measure_activations(
    task: Task, table: SensitivityTable, bits: int, inputs_of: Callable[[Task, QuantizedGraph], Tensor]
) -> None:
    """Measures the groups of ``table.values`` that have no loss at ``bits`` yet.

    Their grids are those of a calibration on float values; the loss is that with one group quantized, all else float.

    Args:
        task: The model prepared with activations of ``bits``.
        table: Takes the losses.
        bits: Of the activations.
        inputs_of: Gives the inputs of a graph that the losses are measured on.
    """
    calibrate_activations(task.model, task.images.split(BATCH))
    calibrate_regions(task.model, task.regions)
    for part in task.model.graphs:
        own = [name for name, group in table.values.items() if set(group.quantizers) <= set(part.quantizers)]
        missing = [name for name in own if bits not in table.activation_loss.get(name, {})]
        if missing:
            loss = output_loss(task, part, inputs_of(task, part), table.kind == FISHER)
            for name in track(missing, f'activations at {bits} bits'):
                quantizers = table.values[name].quantizers
                table.activation_loss.setdefault(name, {})[bits] = loss.of((), quantizers)
