"""Distances between the quantized and the float output of a unit, and how much each element of an output matters.

The Fisher weight of an element is the squared gradient of the task loss at it. Without annotations there is no task
loss. What stands in for it is the distance of the outputs of the network, its weights rounded to nearest, from those of
the float network: of the float network alone that distance has no gradient.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, fx
from torch.nn import functional as F

from mmbrecq.building import check_number
from mmbrecq.data.groups import batches_of, grouped
from mmbrecq.distributed import mean_over
from mmbrecq.errors import NonFiniteError
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.values import CachedValues, Values
from mmbrecq.registry import LOSSES

FISHER_BATCH = 16
"""Images per pass of the whole network that takes gradients at the outputs of its units."""

TaskLoss = Callable[[Any, Tensor], Tensor]
"""Computes the task loss, a scalar, from a batch of calibration data and its preprocessed images."""


@LOSSES.register_module()
class MSELoss:
    """Squared error, summed over channels (axis 1) and averaged over all other axes.

    The sum over channels is the reference implementation's; the weight of the rounding regulariser is meant for it.
    """

    needs_fisher = False

    def __call__(self, output: Tensor, target: Tensor, fisher: Tensor | None = None) -> Tensor:
        """Returns a scalar for a quantized and a float output, both ``(N, C, ...)``; ``fisher`` is not used."""
        # on a GPU the gradient of torch's loss lies in another order in memory than an output with channels innermost
        mean = (output - target).square().mean() if output.is_cuda else F.mse_loss(output, target)
        return mean * output.shape[1]


@LOSSES.register_module()
class RelativeMSELoss:
    """Squared error over the power of the target, position by position, times the number of channels.

    A transformer reads its stream through normalisations, which divide every token by its own magnitude. In trained
    ones a few tokens are a hundred times as large as the others (Sun et al., Massive Activations in Large Language
    Models, COLM 2024), and a plain squared error sees nothing else. Channels are the last axis of ``(N, T, C)``, else
    axis 1.

    Example:
        >>> large = torch.tensor([[[100.0, 0.0], [0.0, 1.0]]])
        >>> float(RelativeMSELoss()(1.1 * large, large))
        0.01...
    """

    needs_fisher = False

    def __call__(self, output: Tensor, target: Tensor, fisher: Tensor | None = None) -> Tensor:
        """Returns a scalar for a quantized and a float output, ``(N, T, C)`` or ``(N, C, ...)``."""
        axis = -1 if output.dim() == 3 else 1
        power = target.square().mean(axis)
        # an error where the target is next to nothing counts as at a thousandth of the mean power
        power = torch.maximum(power, 1e-3 * power.mean()).clamp_min(1e-12)
        return ((output - target).square().mean(axis) / power).mean() * output.shape[axis]


@LOSSES.register_module()
class FisherLoss:
    """Squared error weighted by the diagonal of the Fisher information (Li et al., ICLR 2021, eq. 10).

    The weight of an output element is the squared gradient of the task loss at it, per image, normalised to mean 1
    over the calibration set so that the scale is that of :class:`MSELoss`.

    Args:
        floor: Weight that every element has at least, in [0, 1]; the rest of the unit mean is the gradient's.
            0 is the paper's loss.
    """

    needs_fisher = True

    def __init__(self, floor: float = 0.0) -> None:
        check_number(floor, '[0, 1]', 'floor of FisherLoss')
        self.floor = floor

    def __call__(self, output: Tensor, target: Tensor, fisher: Tensor | None = None) -> Tensor:
        """Returns a scalar; ``fisher`` has the shape of ``output`` and mean 1."""
        assert fisher is not None
        weight = self.floor + (1 - self.floor) * fisher
        return ((output - target).square() * weight).sum(1).mean()


@dataclass(frozen=True)
class FisherWeights:
    """Fisher weights of all outputs.

    Args:
        values: By name of the output, the weights of its elements, ``(N, C, ...)``, with mean 1.
        shares: By name, what an error of 1 in every element adds to the task loss: the sum over positions of the mean
            square of the gradient; 0 where no gradient arrives.
    """

    values: Mapping[str, CachedValues]
    shares: Mapping[str, float]

    def of(self, outputs: Sequence[str]) -> tuple[list[CachedValues], list[float]]:
        """Returns the weights of a unit's outputs, and how much each output counts beside the others, 1 on average.

        Box deltas and class scores differ in what an error does to the task loss, by some orders of magnitude.
        """
        seen = [self.shares[name] for name in outputs if self.shares[name] > 0]
        # an output on which the loss does not depend counts as the others do
        mean = sum(seen) / len(seen) if seen else 1.0
        return [self.values[name] for name in outputs], [(self.shares[name] or mean) / mean for name in outputs]


def task_fisher(
    model: QuantizedModel, batches: Iterable[Any], images: Values, task_loss: TaskLoss, cache: ActivationCache
) -> FisherWeights:
    """Returns squared gradients of the float model's task loss at every unit output, normalised to mean 1.

    One forward and backward pass of the whole network per batch gives them for all units. The arguments are those of
    :func:`visit_task_losses`, and the cache that keeps the weights.

    Raises:
        NonFiniteError: A gradient is not finite, or all at all outputs are zero.
    """
    squares = _Squares(model.image_graph, images, cache)
    visit_task_losses(model, batches, images, task_loss, squares.run, squares.add)
    return squares.normalised(FISHER_BATCH)


def visit_task_losses(
    model: QuantizedModel,
    batches: Iterable[Any],
    images: Values,
    task_loss: TaskLoss,
    forward: Callable[[Tensor], Any],
    visit: Callable[[Tensor, slice], None],
) -> None:
    """Calls ``visit(loss, index)`` with the float network's task loss, summed over the images ``index`` of a batch.

    ``batches`` are calibration data with annotations, in the order of ``images``, ``(N, 3, H, W)``; those beyond the
    images are not read. ``task_loss`` computes a mean over a batch through ``model.model``, whose graph of the images
    ``forward`` computes.
    """
    start = 0
    model.image_graph.traced.attach(forward)
    try:
        with torch.enable_grad(), model.quantization(weights=False, activations=False):
            for batch in batches:
                if start == len(images):
                    break
                x = images[start : start + len(batch['inputs'])].detach().requires_grad_(True)
                if len(x) < len(batch['inputs']):
                    batch = {key: values[: len(x)] for key, values in batch.items()}
                visit(task_loss(batch, x) * len(x), slice(start, start + len(x)))
                start += len(x)
    finally:
        model.image_graph.attach()


def output_fisher(
    graph: QuantizedGraph, inputs: Values, quantized_inputs: Values, cache: ActivationCache, batch_size: int
) -> FisherWeights:
    """Returns squared gradients of the distance between quantized and float outputs, normalised to mean 1.

    The distance is the sum over the outputs of their squared differences, each output in units of its own mean square:
    class scores and box deltas differ in scale. ``inputs`` and ``quantized_inputs``, ``(N, ...)``, are those of the
    float and of the quantized network. NonFiniteError is raised as in :func:`task_fisher`.
    """
    squares = _Squares(graph, inputs, cache)
    for index in batches_of(inputs, batch_size):
        with torch.no_grad(), graph.quantization(weights=False, activations=False):
            targets = flatten_outputs(graph(inputs[index])).values()
        with torch.enable_grad(), graph.quantization(weights=True, activations=False):
            outputs = flatten_outputs(squares.run(quantized_inputs[index].detach().requires_grad_(True))).values()
            pairs = zip(outputs, targets, strict=True)
            squares.add(sum((o - t).square().sum() / t.square().mean().clamp_min(1e-12) for o, t in pairs), index)
    return squares.normalised(batch_size)


def weighted_outputs(graph: QuantizedGraph) -> set[str]:
    """Returns the names of the outputs that have Fisher weights: those of the units, and of the whole graph."""
    return {name for unit in (*graph.units, *graph.cut('net')) if unit.is_quantized for name in unit.outputs}


class _Squares(fx.Interpreter):
    """Squared gradients at the weighted outputs of a graph, which it runs, over all calibration images."""

    def __init__(self, graph: QuantizedGraph, images: Values, cache: ActivationCache) -> None:
        super().__init__(graph.compiled, garbage_collect_values=True)
        self._names = weighted_outputs(graph)
        self._recorded: dict[str, Tensor] = {}
        self._images, self._cache = images, cache
        self._weights: dict[str, CachedValues] = {}
        self._sums: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self._recorded[n.name] = value
        return value

    def add(self, loss: Any, index: slice) -> None:
        """Adds the gradients of ``loss``, a scalar, for the images ``index``, which ran last."""
        values = list(self._recorded.values())
        gradients = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
        for name, gradient in zip(self._recorded, gradients, strict=True):
            if name not in self._weights:
                shape = len(self._images), *gradient.shape[1:]
                self._weights[name] = self._cache.allocate(shape, like=self._images)
                self._sums[name] = 0.0
            squares = gradient.square()
            self._weights[name].write(index.start, squares)
            self._sums[name] += float(squares.sum(dtype=torch.float64))

    def normalised(self, batch_size: int) -> FisherWeights:
        """Returns the squares of each output over their mean; ones where the loss does not depend on an output.

        A level of a feature pyramid on which no object of the calibration images falls is such an output.
        """
        parts = {n: [(len(part), part.sample_shape) for part in grouped(w).parts] for n, w in self._weights.items()}
        means = {n: mean_over(self._sums[n], sum(count * s.numel() for count, s in p)) for n, p in parts.items()}
        for name, mean in means.items():
            if not 0 <= mean < float('inf'):
                raise NonFiniteError(f"expected finite gradients at '{name}', but their mean square is {mean}")
        unseen = [name for name, mean in means.items() if mean == 0]
        if len(unseen) == len(means):
            raise NonFiniteError(
                f'expected gradients of the loss at the outputs of the units, but all of them are zero: {unseen}'
            )
        if unseen:
            text = f'no calibration image has a loss that depends on {unseen}: errors there count unweighted'
            print_log(text, logger='current', level=WARNING)
        for name, weight in self._weights.items():
            for index in batches_of(weight, batch_size):
                part = weight[index]
                weight.write(index.start, part / means[name] if means[name] else torch.ones_like(part))
        positions = {n: sum(count * s[1:].numel() for count, s in p) / len(self._images) for n, p in parts.items()}
        return FisherWeights(self._weights, {name: mean * positions[name] for name, mean in means.items()})
