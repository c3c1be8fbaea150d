"""Calibration: grids of weights from their values, grids of activations from observing calibration images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from mmbrecq.calibration.regions import RegionCapture, no_regions
from mmbrecq.errors import DataError, NonFiniteError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.weight import original_weight
from mmbrecq.observers import build_observer
from mmbrecq.quantizers.prepared import QuantizedModel


def calibrate_weights(model: QuantizedModel) -> None:
    """Finds the grid of every quantized weight and rounds it to nearest.

    Raises:
        NonFiniteError: A weight is NaN or infinite; its layer is named.
    """
    for name, module, fake_quant in model.weights():
        weight = original_weight(module)
        observer = build_observer(dict(model.observers['weight']), fake_quant.qtype)
        try:
            observer.observe(weight)
        except NonFiniteError as error:
            raise NonFiniteError(f"weight of layer '{name}': {error}") from error
        fake_quant.calibrate(weight, *observer.compute())


@contextmanager
def observing(model: QuantizedModel, quantizers: Sequence[FakeQuantize]) -> Iterator[None]:
    """Observes all values that pass the quantizers within the block, and sets their grids at its end."""
    names = {id(quantizer): name for name, quantizer in model.quantizers.items()}
    for quantizer in quantizers:
        quantizer.observer = build_observer(dict(model.observers['activation']), quantizer.qtype)
    try:
        yield
        for quantizer in quantizers:
            assert quantizer.observer is not None
            try:
                quantizer.set_grid(*quantizer.observer.compute())
            except DataError as error:
                raise DataError(f"activation '{names[id(quantizer)]}': {error}") from error
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


def calibrate_regions(model: QuantizedModel, capture: RegionCapture) -> None:
    """Finds the grid of every activation of the heads of a two-stage detector; without heads there is nothing to do.

    Raises:
        DataError: No region is proposed on any image.
    """
    if not any(head.quantizers for head in model.heads):
        return
    with ExitStack() as stack:
        for head in model.heads:
            stack.enter_context(observing(head, list(head.quantizers.values())))
        capture.observe()
        for head in model.heads:
            observers = [quantizer.observer for quantizer in head.quantizers.values()]
            if any(observer is None or observer.batches == 0 for observer in observers):
                raise no_regions(head)


def calibrate_activations(model: QuantizedModel, images: Iterable[Tensor]) -> None:
    """Finds the grid of every activation from the float model's values.

    Args:
        model: The prepared model.
        images: Batches of preprocessed images.

    Raises:
        NonFiniteError: An activation is NaN or infinite.
    """
    quantizers = list(model.quantizers.values())
    if not quantizers:
        return
    with torch.no_grad(), model.quantization(weights=False, activations=False), observing(model, quantizers):
        for batch in images:
            model(batch)
