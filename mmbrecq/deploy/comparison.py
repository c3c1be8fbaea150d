"""Comparison of an exported file with the simulation that it was written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmbrecq.deploy.backends import open_backend
from mmbrecq.errors import ExportError
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel

LARGEST_DEVIATION = 0.05
"""Relative error from which a file is refused. Sums in another order flip single roundings; at few bits a flip grows
from layer to layer, to 1e-3 in the worst networks seen. A wrong operation gives 0.1 and more."""

BATCHES = (1, 3)


@dataclass(frozen=True)
class Deviation:
    """How far a file lies from its simulation.

    Args:
        file: Name of the file.
        runtime: Name of the runtime that ran it.
        batch: Number of images, or of regions.
        error: Squared error of all outputs over the power of the simulated ones.
    """

    file: str
    runtime: str
    batch: int
    error: float

    def __str__(self) -> str:
        return (
            f'{self.file} in {self.runtime}, batch of {self.batch}: off its simulation by {self.error:.1e} of the power'
        )


def compare(model: QuantizedModel, paths: Sequence[Path], images: Tensor) -> list[Deviation]:
    """Runs the exported files of a packed model on one and on three images, and holds them against the simulation.

    Args:
        model: The packed model.
        paths: The file of each graph, in their order, as an exporter returned them.
        images (Tensor): Preprocessed images, ``(N, C, H, W)``; fewer than three are repeated. Graphs that read features
            of regions are given random features.

    Raises:
        BackendError: A runtime refuses a file or its input.
        ExportError: A file computes something else than the simulation.
    """
    found = []
    for graph, path in zip(model.graphs, paths, strict=True):
        backend = open_backend(path)
        inputs = images
        if graph.is_region:
            shape, generator = graph.traced.example.shape[1:], torch.Generator().manual_seed(0)
            inputs = torch.rand(max(BATCHES), *shape, generator=generator).to(graph.traced.example.device)
        for batch in BATCHES:
            x = inputs[torch.arange(batch) % len(inputs)]
            error = _relative_error(graph, x, dict(zip(backend.output_names, backend(x), strict=True)))
            found.append(Deviation(path.name, backend.name, batch, error))
            if not error <= LARGEST_DEVIATION:
                raise ExportError(
                    f'expected {path.name} in {backend.name} to compute what is simulated, but for a batch of {batch} '
                    f'its outputs are off by {error:.2g} of their power'
                )
    return found


def _relative_error(graph: QuantizedGraph, x: Tensor, outputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        simulated = {name: value.cpu().double() for name, value in flatten_outputs(graph(x)).items()}
    for name, value in simulated.items():
        if outputs[name].shape != value.shape:
            raise ExportError(
                f'expected {name} of shape {tuple(value.shape)} from the exported file, '
                f'but got {tuple(outputs[name].shape)}'
            )
    error = sum(float((outputs[name].double() - value).square().sum()) for name, value in simulated.items())
    power = sum(float(value.square().sum()) for value in simulated.values())
    return error / power if power else error
