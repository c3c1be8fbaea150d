"""Finds the grids of weights from their values, and the grids of activations by observing calibration images."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from mmbrecq.calibration.regions import RegionCapture, no_regions
from mmbrecq.distributed import gather
from mmbrecq.errors import DataError, NonFiniteError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import LARGEST_BIAS, raise_weight_scale
from mmbrecq.fake_quants.weight import original_weight
from mmbrecq.observers import BaseObserver, MinMaxObserver, build_observer
from mmbrecq.observers.base import SharedZeroPointObserver
from mmbrecq.qtype import QType
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel

OBSERVED = 64
"""Default number of images per batch whose activations are observed."""


def calibrate_weights(model: QuantizedModel) -> None:
    """Finds the grid of every quantized weight and rounds it to nearest; NonFiniteError names a layer with NaN."""
    for name, module, fake_quant in model.weights():
        weight = original_weight(module)
        observer = build_observer(dict(model.observers['weight']), fake_quant.qtype)
        try:
            observer.observe(weight)
        except NonFiniteError as error:
            raise NonFiniteError(f"weight of layer '{name}': {error}") from error
        fake_quant.calibrate(weight, *observer.compute())


@contextmanager
def observing(model: QuantizedModel, quantizers: Sequence[FakeQuantize], first: int | None = 0) -> Iterator[None]:
    """Observes all values that pass the quantizers within the block, and sets their grids at its end.

    Several processes observe the values of their images, and all find the grid of the values of all processes.
    ``first`` is the number of the first batch that this one observes, among all; None where that is not known.
    """
    names = {id(q): name for graph in model.graphs for name, q in graph.quantizers.items()}
    for quantizer in quantizers:
        quantizer.observer = _build_activation_observer(model, quantizer.qtype)
        quantizer.observer.first = first
    try:
        yield
        observers = [quantizer.observer for quantizer in quantizers if quantizer.observer is not None]
        # the statistics of all processes, in their order
        for quantizer, observer, *others in zip(quantizers, *gather(observers), strict=True):
            for other in others:
                observer.merge(other)
            try:
                quantizer.set_grid(*observer.compute())
            except DataError as error:
                raise DataError(f"activation '{names[id(quantizer)]}': {error}") from error
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


def _build_activation_observer(model: QuantizedModel, qtype: QType) -> BaseObserver:
    """Builds the configured observer; channels that the preset gives a scale each have their whole range.

    A search for every channel would cost a histogram of each, and gain little where no channel shares its scale.
    """
    if qtype.ch_axis is not None and model.preset.depthwise_per_channel:
        return SharedZeroPointObserver(qtype) if model.preset.folds_channel_scales else MinMaxObserver(qtype)
    return build_observer(dict(model.observers['activation']), qtype)


def calibrate_regions(model: QuantizedModel, capture: RegionCapture, first_batch: int = 0) -> None:
    """Finds the grid of every activation of the heads of a two-stage detector, if the model has heads.

    ``first_batch`` is the number of the first batch among those of all processes; DataError if no region is proposed.
    """
    if not any(head.quantizers for head in model.region_graphs):
        return
    with ExitStack() as stack:
        for head in model.region_graphs:
            stack.enter_context(observing(model, list(head.quantizers.values()), first_batch))
        capture.observe()
        for head in model.region_graphs:
            observers = [quantizer.observer for quantizer in head.quantizers.values()]
            if not any(gather(all(observer is not None and observer.batches for observer in observers))):
                raise no_regions(head)
    for head in model.region_graphs:
        raise_weight_scales(head)


def calibrate_activations(model: QuantizedModel, images: Iterable[Tensor], first: int = 0) -> None:
    """Finds the grid of every activation from the float model's values for batches of preprocessed images.

    ``first`` is the number of the first batch among those of all processes; NonFiniteError if a value is NaN or
    infinite.
    """
    graph = model.image_graph
    quantizers = list(graph.quantizers.values())
    if not quantizers:
        return
    with torch.no_grad(), model.quantization(weights=False, activations=False), observing(model, quantizers, first):
        for batch in images:
            graph(batch)
    raise_weight_scales(graph)


def raise_weight_scales(graph: QuantizedGraph) -> None:
    """Raises calibrated weight scales with which a bias would not fit int32, see :func:`raise_weight_scale`.

    The limit is a quarter of int32's, since the reconstruction may lower the scales and raise the biases.
    """
    read = graph.read_quantizers()
    for name, module, fake_quant in graph.weights():
        scales = [graph.quantizers[path].scale for path in read.get(name, ())]
        raise_weight_scale(module, fake_quant, original_weight(module), scales, LARGEST_BIAS / 4)
