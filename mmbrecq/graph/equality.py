"""Compares a prepared graph with the float model that it was made from.

The model is changed by its preparation, so its outputs are taken before, with the size and the power of what every
layer reads and returns: the latter tell where the two part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.components import ImageForward
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.traced_graph import evaluation_mode, other_size

TOLERANCE = 1e-5
"""Largest squared error, of the variance of the outputs over images."""

_ROUNDING = 1e-9
"""What float32 may lose, of the outputs' power."""

Sums = tuple[str, str, tuple[float, ...]]


@dataclass(frozen=True)
class Reference:
    """What a float model computes for some images.

    Args:
        model: The model, which may change later on.
        batches: Images of several batch sizes, those of another height and width last.
        outputs: Tensors by name for each batch; None where the model does not run at that size.
        sums: Of each batch, what each layer that was called reads and returns, summed up: path, what, and sums.
    """

    model: nn.Module
    batches: Sequence[Tensor]
    outputs: list[dict[str, Tensor] | None] = field(default_factory=list)
    sums: list[list[Sums]] = field(default_factory=list)


def take_reference(model: nn.Module, images: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Reference:
    """Runs the float model on one image, on three, and on one of another height and width.

    Args:
        model: The model, not prepared yet.
        images (Tensor): Preprocessed images, ``(N, 3, H, W)``, or features of regions.
        forward: Computes the outputs; None for what follows from images.

    Raises:
        GraphError: An output is no tensor.
    """
    three = torch.cat([images, images.flip(-1), images.flip(-2)])[:3]
    batches = [three[:1], three, other_size(three[:1])] if images.dim() == 4 else [three[:1], three]
    reference = Reference(model, batches)
    forward = ImageForward(model) if forward is None else forward
    for index, batch in enumerate(batches):
        if index < 2:
            outputs, sums = _run(model, forward, batch)
        else:
            outputs, sums = None, []
            with suppress(Exception):
                outputs, sums = _run(model, forward, batch)
        reference.outputs.append(outputs)
        reference.sums.append(sums)
    return reference


def check_equality(run: Callable[[Tensor], Any], reference: Reference, free_size: bool = True) -> float:
    """Checks that a prepared graph computes what the float model did.

    Args:
        run: The prepared graph, its quantization off.
        reference: Of the float model.
        free_size: Whether the graph has to be right at another height and width.

    Returns:
        The largest squared error of an output, of its power.

    Raises:
        GraphError: It does not; the sentence names the first layer whose input or output differs.
    """
    worst = 0.0
    for batch, wanted, sums in zip(reference.batches, reference.outputs, reference.sums, strict=True):
        is_other = batch.shape[2:] != reference.batches[0].shape[2:]
        if wanted is None or (is_other and not free_size):
            continue
        found, own = _run(reference.model, run, batch)
        error = max((_error(found.get(name), output) for name, output in wanted.items()), default=0.0)
        if not error <= TOLERANCE or list(found) != list(wanted):
            shape = ' x '.join(map(str, batch.shape))
            raise GraphError(
                f'expected the prepared graph to compute what {type(reference.model).__name__} does, but for images of '
                f'{shape} it is off by {error:.1e} of the variance of its outputs{_first_difference(own, sums)}'
            )
        worst = max(worst, error)
    return worst


def _run(model: nn.Module, forward: Callable[[Tensor], Any], batch: Tensor) -> tuple[dict[str, Tensor], list[Sums]]:
    with evaluation_mode(model), _summing(model) as sums:
        # a model may write into its input
        return flatten_outputs(forward(batch.clone())), sums


@contextmanager
def _summing(model: nn.Module) -> Iterator[list[Sums]]:
    """Notes what every innermost module reads and returns."""
    sums: list[Sums] = []
    hooks = []
    for path, module in model.named_modules():
        if path and not any(module.children()) and type(module) is not nn.Identity:
            hooks.append(module.register_forward_pre_hook(partial(_note_input, sums, path)))
            hooks.append(module.register_forward_hook(partial(_note_output, sums, path)))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _note_input(sums: list[Sums], path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], Tensor):
        sums.append((path, 'the input', _sums(args[0])))


def _note_output(sums: list[Sums], path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if isinstance(output, Tensor):
        sums.append((path, 'the output', _sums(output)))


def _sums(tensor: Tensor) -> tuple[float, ...]:
    """The shape, the sum of absolute values, and a sum with weights that tell places apart."""
    values = tensor.detach().flatten().double()
    weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device)
    return (*map(float, tensor.shape), float(values.abs().sum()), float((values * weights).sum()))


def _first_difference(found: list[Sums], wanted: list[Sums]) -> str:
    """Names the first layer that reads or returns something else; a folded BatchNorm changes what layers return."""
    own: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for path, what, sums in found:
        own.setdefault((path, what), []).append(sums)
    for path, what, sums in wanted:
        theirs = own.get((path, what), [])
        if not theirs:
            continue
        size = max(abs(sums[-2]), 1e-30)
        present = theirs.pop(0)
        if len(present) != len(sums) or any(abs(a - b) > 1e-3 * size for a, b in zip(present, sums, strict=True)):
            return f', first at {what} of {path}'
    return ', after the last layer'


def _error(found: Tensor | None, wanted: Tensor) -> float:
    """Squared error, of the variance over images and of what rounding may cost."""
    if found is None or found.shape != wanted.shape:
        return float('inf')
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float('inf')
    found, wanted = found.double(), wanted.double()
    power = float(wanted.square().mean())
    variance = float(wanted.var(0, correction=0).mean()) if len(wanted) > 1 else power
    allowed = max(variance, power * _ROUNDING / TOLERANCE, 1e-30)
    return float((found - wanted).square().mean()) / allowed
