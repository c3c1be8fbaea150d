"""Compares a prepared graph with the float model that it was made from.

The preparation changes the model, so its outputs are computed before, with sums of what every layer reads: these tell
where the two first differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.errors import GraphError, MMBrecqError, first_line
from mmbrecq.graph.components import ImageForward, pre_hooks
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.traced_graph import evaluation_mode, other_size, smaller

TOLERANCE = 1e-5
"""Largest squared error, of the variance of the outputs over images."""

NOISE, TIMES, LIMIT = 3e-6, 10.0, 1e-3
"""A graph is not asked to be nearer to the model than ten times what noise of 3e-6 on the images makes of its own
outputs, up to 1e-3: some models amplify what float32 rounds apart."""

_ROUNDING = 1e-7
"""Squared error that float32 may cause, of the outputs' power: where images hardly differ, that is more."""

Read = tuple[str, tuple[float, ...]]


@dataclass(frozen=True)
class Reference:
    """Holds what a float model computes for some images.

    Args:
        model: The model, which may change later on.
        batches: Images of several batch sizes, those of another height and width last.
        outputs: Tensors by name for each batch that the model runs on.
        reads: For each batch, the path of every layer that was called, and sums of what it read.
    """

    model: nn.Module
    batches: Sequence[Tensor]
    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    reads: list[list[Read]] = field(default_factory=list)


@contextmanager
def full_float32() -> Iterator[None]:
    """Computes on a GPU in float32 as a CPU does, not in TF32, which torch takes for convolutions, within the block."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def take_reference(model: nn.Module, images: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Reference:
    """Runs the float model on one image, on three, and on one of another height and width.

    Of large images only the first is taken as a whole, and corners of the others, where the model runs on these.
    ``forward`` computes the outputs, by default as :class:`ImageForward`. GraphError is raised if one of them is no
    tensor, or if they follow from random numbers or from earlier passes.
    """
    forward = ImageForward(model) if forward is None else forward
    three, corners = (torch.cat([x, x.flip(-1), x.flip(-2)])[:3] for x in (images, smaller(images)))
    if corners.shape != three.shape and not _runs(model, forward, corners):
        corners = three
    batches = [three[:1], corners, other_size(corners[:1])] if images.dim() == 4 else [three[:1], three]
    reference = Reference(model, batches)
    layers = {path: m for path, m in model.named_modules() if path and not any(m.children())}
    weights = _versions(model.named_parameters())
    for index, batch in enumerate(batches):
        # another height and width is more than every model has
        try:
            outputs, reads = _run(model, forward, batch, layers)
        except MMBrecqError:
            raise
        except Exception as error:
            if index == 2:
                break
            shape = ' x '.join(map(str, batch.shape))
            raise GraphError(
                f'{type(model).__name__} does not run on images of {shape}: {first_line(error)}'
            ) from error
        reference.outputs.append(outputs)
        reference.reads.append(reads)
    _expect_repetition(reference, forward, layers)
    changed = _changed(weights, model.named_parameters())
    if changed:
        raise GraphError(f'expected a forward pass that keeps all weights, but it changes {min(changed)}')
    return reference


def _runs(model: nn.Module, forward: Callable[[Tensor], Any], batch: Tensor) -> bool:
    with suppress(Exception), evaluation_mode(model):
        forward(batch.clone())
        return True
    return False


def _expect_repetition(reference: Reference, forward: Callable[[Tensor], Any], layers: Mapping[str, nn.Module]) -> None:
    """Raises GraphError if another pass over the same image computes something else, now or after many more."""
    index = min(range(2), key=lambda i: reference.batches[i].numel())
    model, batch, wanted = reference.model, reference.batches[index], reference.outputs[index]
    reads = reference.reads[index]
    buffers = _versions(model.named_buffers())
    found, own = _run(model, forward, batch, layers)
    changed = _changed(buffers, model.named_buffers())
    difference, where = _difference(forward, batch, found, wanted), _first_difference(own, reads)
    if changed and not difference:
        # what follows from the size of the images, as tables of rotary positions, is kept as long as that stays
        buffers = _versions(model.named_buffers())
        _run(model, forward, batch, layers)
        changed = _changed(buffers, model.named_buffers())
    if changed and not difference:
        kept = {path: buffer.clone() for path, buffer in changed.items()}
        for buffer in changed.values():
            # a counter may be compared with a bound that it reaches after long
            buffer.add_(10**6) if buffer.dtype in (torch.int64, torch.float32) else buffer.logical_not_()
        found, own = _run(model, forward, batch, layers)
        difference, where = _difference(forward, batch, found, wanted), _first_difference(own, reads)
        for path, buffer in changed.items():
            buffer.copy_(kept[path])
    if difference:
        cause = f'it computes with {min(changed)}, which it changes' if changed else 'it draws random numbers or counts'
        raise GraphError(
            f'expected {type(model).__name__} to compute the same whenever it is given the same images, but in another '
            f'pass {difference.partition("; noise")[0]}{where}: {cause}'
        )


def _versions(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[Tensor, str]]:
    """Returns the tensors by path, each with the sum of its values: torch does not count writes by ``.data``."""
    return {path: (t, str(t.detach().sum().item())) for path, t in tensors}


def _changed(before: Mapping[str, tuple[Tensor, str]], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors that have been written into, or are others than before."""
    present = _versions(tensors)
    return {p: t for p, (t, v) in present.items() if p in before and (before[p][0] is not t or before[p][1] != v)}


def _difference(
    run: Callable[[Tensor], Any], batch: Tensor, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> str:
    shapes = [', '.join(f'{name} {tuple(t.shape)}' for name, t in outputs.items()) for outputs in (found, wanted)]
    if shapes[0] != shapes[1]:
        return f'its outputs have the shapes {shapes[0]} instead of {shapes[1]}'
    return unexplained_error(run, batch, found, wanted, 'it is off by {} of the variance of its outputs')


def check_equality(run: Callable[[Tensor], Any], reference: Reference, free_size: bool = True) -> None:
    """Checks that a prepared graph, its quantization off, computes what the float model did.

    With ``free_size`` it has to be right at another height and width, too. GraphError is raised if it differs; the
    sentence names the first layer whose input or output does.
    """
    for batch, wanted, reads in zip(reference.batches, reference.outputs, reference.reads, strict=False):
        if batch.shape[2:] != reference.batches[0].shape[2:] and not free_size:
            continue
        # merged branches are gone
        present = dict(reference.model.named_modules())
        layers = {path: present[path] for path, _ in reads if path in present}
        found, own = _run(reference.model, run, batch, layers)
        difference = _difference(run, batch, found, wanted)
        if difference:
            raise GraphError(
                f'expected the prepared graph to compute what {type(reference.model).__name__} does, but for images of '
                f'{" x ".join(map(str, batch.shape))} {difference}{_first_difference(own, reads)}'
            )


def unexplained_error(
    run: Callable[[Tensor], Any], batch: Tensor, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], text: str
) -> str:
    """Returns ``text`` with the largest error of an output, or nothing where rounding may explain it.

    ``run`` is the model or graph that computed ``found`` of ``batch``; it may amplify what float32 rounds.
    """
    error = max((output_error(found[name], value) for name, value in wanted.items()), default=0.0)
    if error <= TOLERANCE:
        return ''
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0)).to(batch)
    with torch.no_grad():
        noisy = flatten_outputs(run(batch * (1 + NOISE * noise)))
    own = max(output_error(noisy[name], value) for name, value in found.items())
    if error <= min(TIMES * own, LIMIT):
        return ''
    remark = f'; noise of {NOISE:g} on the images changes them by {own:.1e}, so that nothing can be compared'
    return text.format(f'{error:.1e}') + (remark if TIMES * own > LIMIT else '')


def _run(
    model: nn.Module, forward: Callable[[Tensor], Any], batch: Tensor, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], list[Read]]:
    reads: list[Read] = []

    def note(path: str, args: tuple[Any, ...]) -> None:
        """Notes the shape of an input, the sum of its absolute values, and a sum weighted by the index."""
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            values = args[0].detach().flatten()
            weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device)
            reads.append((path, (*map(float, args[0].shape), float(values.abs().sum()), float(values @ weights))))

    with evaluation_mode(model), pre_hooks(layers, note):
        # a model may write into its input
        return flatten_outputs(forward(batch.clone())), reads


def _first_difference(found: list[Read], wanted: list[Read]) -> str:
    """Names the first layer that reads something else, of those that both call, and the layer called before it."""
    own: dict[str, list[tuple[float, ...]]] = {}
    for path, sums in found:
        own.setdefault(path, []).append(sums)
    before = ''
    for path, sums in wanted:
        if own.get(path):
            present = own[path].pop(0)
            far = [abs(a - b) > 1e-3 * abs(sums[-2]) for a, b in zip(present, sums, strict=False)]
            if any(far) or len(present) != len(sums):
                return f', first after {before or "the input"}, in what {path} reads'
        before = path
    return f', after {before}' if before else ''


def output_error(found: Tensor, wanted: Tensor) -> float:
    """Returns the squared error, of the variance over images and of what rounding may cause."""
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float('inf')
    found, wanted = found.double(), wanted.double()
    power = float(wanted.square().mean())
    variance = float(wanted.var(0, correction=0).mean()) if wanted.dim() and len(wanted) > 1 else power
    allowed = max(variance, power * _ROUNDING / TOLERANCE, 1e-30)
    return float((found - wanted).square().mean()) / allowed
