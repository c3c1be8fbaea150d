"""Comparison of an exported file with the simulation that it was written from."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmbrecq.deploy.backends import open_backend
from mmbrecq.errors import ExportError
from mmbrecq.graph.equality import full_float32
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel

LARGEST_DEVIATION = 0.05
"""Relative error from which a file is refused. Sums in another order flip single roundings; at few bits a flip grows
from layer to layer, to 1e-3 in the worst networks seen. A wrong operation gives 0.1 and more."""

NOISE, TIMES, LIMIT = 1e-6, 10, 0.5
"""A file may lie further away, by ten times what noise of 1e-6 on the output of every layer makes of the simulation and
half of the power at most: random weights amplify what float32 rounds apart. That is logged."""

BATCHES = (1, 3)


@dataclass(frozen=True)
class Deviation:
    """How far a file lies from its simulation, for a ``batch`` of so many images, or regions.

    The ``error`` is the squared one of all outputs over the power of the simulated ones.
    """

    file: str
    runtime: str
    batch: int
    error: float

    def __str__(self) -> str:
        return (
            f'{self.file} in {self.runtime}, batch of {self.batch}: off its simulation by {self.error:.1e} of the power'
        )


@full_float32()
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
            if error <= LARGEST_DEVIATION:
                continue
            own = _relative_error(graph, x, _with_noise(graph, x))
            if not error <= min(TIMES * own, LIMIT):
                raise ExportError(
                    f'expected {path.name} in {backend.name} to compute what is simulated, but for a batch of {batch} '
                    f'its outputs are off by {error:.2g} of their power'
                )
            remark = f'noise of {NOISE:g} in its layers moves the simulation itself by {own:.1e}'
            print_log(f'{found[-1]}; {remark}', 'current', logging.WARNING)
    return found


def _with_noise(graph: QuantizedGraph, x: Tensor) -> dict[str, Tensor]:
    """Returns the simulated outputs with noise on what every layer computes."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + NOISE * torch.randn(output.shape, generator=generator).to(output))

    with ExitStack() as hooks, torch.no_grad():
        for layer in graph.layers:
            hooks.enter_context(graph.model.get_submodule(layer.name).register_forward_hook(disturb))
        return {name: value.cpu() for name, value in flatten_outputs(graph(x)).items()}


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
