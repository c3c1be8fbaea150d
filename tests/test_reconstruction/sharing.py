"""Calibrates and reconstructs a small classifier, in one process or in several that share its images.

Called by a test as ``sharing.py FILE``; each process writes what it has found to ``FILE`` with its number.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import IMAGES, labels, make_classifier, make_images
from torch import nn

from mmbrecq import pipeline
from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights
from mmbrecq.calibration.equalization import equalize_parts
from mmbrecq.data.groups import Grouped, grouped
from mmbrecq.distributed import aligned_batches, check_same_bits, join_processes, on_main, process_index, share_of
from mmbrecq.errors import ConfigError, ProcessError
from mmbrecq.mixed_precision.sensitivity.measure import OutputLoss
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, Task
from mmbrecq.reconstruction.callbacks import Callback

OBSERVERS = ('MinMaxObserver', 'MovingAverageObserver', 'PercentileObserver', 'MSEObserver', 'HistogramObserver')
BATCH = 10
"""Does not divide a share, so one batch lies on the border of two."""


def prepare(share: range, observer: str, equalization: float = 0.0) -> QuantizedModel:
    """The classifier with its grids, found on the images of a share."""
    weight = {'bits': 2, 'observer': {'type': 'MinMaxObserver'}}
    activation = {'bits': 4, 'observer': {'type': observer}}
    quantizer = BRECQQuantizer(weight, activation, first_last_8bit=False, equalization=equalization)
    model = quantizer.prepare(make_classifier(), make_images()[:2])
    images = make_images()[share.start : share.stop]
    equalize_parts(model, images, task_of(model, share).regions)
    calibrate_weights(model)
    batches = aligned_batches(len(images), BATCH, share.start)
    calibrate_activations(model, [images[batch] for batch in batches], share.start // BATCH)
    return model


def task_of(model: QuantizedModel, share: range) -> Task:
    images, targets = (values[share.start : share.stop] for values in (make_images(), labels()))

    def batches() -> list[dict[str, Any]]:
        return [
            {'inputs': list(images[batch]), 'data_samples': targets[batch]}
            for batch in aligned_batches(len(images), BATCH, share.start)
        ]

    def task_loss(batch: Any, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model.model(inputs, mode='tensor'), batch['data_samples'])

    return Task(model, images, batches, task_loss, 0, Path(tempfile.gettempdir()), first=share.start)


def reconstruct(share: range, loss: str) -> dict[str, Any]:
    """A reconstruction that takes all images in every step: the same steps, whoever has them."""
    model = prepare(share, 'MinMaxObserver')
    task = task_of(model, share)
    steps = {'batch_size': len(share)}
    weight = 1.0 if loss == 'FisherLowRankLoss' else 0.0
    reconstructor = BRECQReconstructor(
        {**steps, 'iterations': 60},
        {**steps, 'iterations': 40},
        loss={'type': loss},
        global_weight=weight,
        cache='host',
    )
    results = reconstructor.run(task, reconstructor.plan(task), Callback())
    return {
        'losses': [(result.loss_before, result.loss_after) for result in results],
        'digest': check_same_bits(model.model),
        'distance': OutputLoss(model.image_graph, task.images).of({layer.name for layer in model.layers}),
        'scales': {name: quantizer.scale.detach() for name, quantizer in model.image_graph.quantizers.items()},
    }


def groups(share: range) -> dict[str, Any]:
    """The same for images of two sizes, of which a process may have one alone; its steps draw groups of their own."""
    images, ends = make_images(), [14, IMAGES]
    sizes = zip(images.split(14), ((8, 12), (12, 8)), strict=True)
    whole = Grouped([nn.functional.interpolate(part, size, mode='bilinear') for part, size in sizes], ends)
    own = Grouped(grouped(whole[share.start : share.stop]).parts, ends)
    weight = {'bits': 2, 'observer': {'type': 'MinMaxObserver'}}
    activation = {'bits': 4, 'observer': {'type': 'MovingAverageObserver'}}
    quantizer = BRECQQuantizer(weight, activation, first_last_8bit=False, equalization=0.75)
    model = quantizer.prepare(make_classifier(), images[:2])
    task = replace(task_of(model, share), images=own, task_loss=None)
    pipeline.calibrate(task, BATCH)
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    steps = {'batch_size': 4, 'iterations': 30}
    reconstructor = BRECQReconstructor(steps, steps, loss={'type': 'FisherLoss'}, cache='host')
    results = reconstructor.run(task, reconstructor.plan(task), Callback())
    losses = [(result.loss_before, result.loss_after) for result in results]
    return {'groups': len(own.parts), 'calibrated': state, 'losses': losses, 'digest': check_same_bits(model.model)}


def refusals(model: nn.Module) -> dict[str, str]:
    """What is said of an error in the first process, and of models that differ."""
    said = {}

    def fail() -> None:
        raise ConfigError(f'expected this from process {process_index()}')

    try:
        on_main(fail)
    except ConfigError as error:
        said['on main'] = str(error)
    with torch.no_grad():
        next(iter(model.parameters())).add_(process_index())
    try:
        check_same_bits(model)
    except ProcessError as error:
        said['bits'] = str(error)
    return said


def main() -> None:
    """Writes what was found."""
    join_processes('pytorch' if 'RANK' in os.environ else 'none')
    torch.set_num_threads(1)
    share = share_of(IMAGES)
    found: dict[str, Any] = {'share': (share.start, share.stop)}
    for observer in OBSERVERS:
        model = prepare(share, observer)
        found[observer] = {name: quantizer.scale.detach() for name, quantizer in model.image_graph.quantizers.items()}
    found['equalized'] = prepare(share, 'MinMaxObserver', equalization=0.75).model.state_dict()
    for loss in ('MSELoss', 'FisherLoss', 'FisherLowRankLoss'):
        found[loss] = reconstruct(share, loss)
    found['groups'] = groups(share)
    found['refusals'] = refusals(make_classifier())
    torch.save(found, f'{sys.argv[1]}{process_index()}')


if __name__ == '__main__':
    main()
