"""The optimisation of one unit, and the step sizes that it starts from."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from mmbrecq.data.groups import batches_of
from mmbrecq.distributed import average, mean_over
from mmbrecq.errors import NonFiniteError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.masks import RandomMasks, mix_
from mmbrecq.fake_quants.weight import WeightFakeQuantize
from mmbrecq.graph.components import graph_module
from mmbrecq.graph.symbolic import called_module
from mmbrecq.reconstruction.batches import Batch, Batches, MicroBatches, UnitData, UnitLoss
from mmbrecq.reconstruction.capture import Replay, can_capture
from mmbrecq.reconstruction.stages import AUTOCAST, Stage
from mmbrecq.reconstruction.values import memory_format
from mmbrecq.reconstruction.variables import Adam, Variables

CHECK_INTERVAL = 100
"""Iterations between looks at the losses: each look waits for the device."""
FEWEST_ROWS = 256
"""Positions of all images below which a layer on a CPU does not multiply in another dtype: converting its weight would
cost more than the product gains."""
RANGE_FACTORS = (0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.71, 0.84, 1.0, 1.19, 1.41, 2.0)
"""Multiples of an observed step size that are tried; 1 is kept where none is better by more than a fiftieth."""
RANGE_IMAGES = 32


def optimize_unit(
    name: str,
    module: nn.Module,
    weights: Sequence[tuple[nn.Module, WeightFakeQuantize]],
    quantizers: Sequence[FakeQuantize],
    data: UnitData[Any],
    loss: UnitLoss,
    stage: Stage,
    generator: torch.Generator,
    device: torch.device,
    on_step: Callable[[int, float], None],
    micro_batches: MicroBatches | None = None,
) -> int:
    """Learns rounding and step sizes of one unit; the fake quantizers are switched as the stage needs them.

    Args:
        name: Of the unit, for messages.
        module: ``module(*inputs) -> tuple`` of outputs.
        weights: Modules with a quantized weight and their fake quantizers.
        quantizers: Activation quantizers.
        data: Inputs and targets.
        loss: Distance of an output from its target.
        stage: What is learned, and how.
        generator: Source of all random draws, on the CPU.
        device: Where the unit runs.
        on_step: Called now and then with the number of iterations and the loss.
        micro_batches: How many images the unit computes at once; None for whole batches as long as they fit.

    Returns:
        Number of iterations; 0 where there is nothing to learn.

    Raises:
        NonFiniteError: The loss stops being finite; unit and iteration are named.
    """
    options = stage.options
    layout = memory_format(module)
    variables = Variables(module, weights, quantizers, stage, layout)
    if not variables.groups:
        return 0
    optimizer = Adam(variables.groups)
    best = math.inf
    # rounding is decided by what follows the warm-up
    end = int(options.warmup * options.iterations) if variables.alphas else options.iterations
    # the position in the schedules is beyond the count where a plateau has skipped some
    position = count = 0
    losses = torch.zeros(options.iterations, device=device)
    masks = RandomMasks(1 - options.drop_prob, generator) if options.drop_prob > 0 else None
    fitting = micro_batches or MicroBatches(name, min(options.batch_size, len(data.targets[0])))
    batches = Batches(data, options.batch_size, options.iterations, generator, device, masks is not None)

    def distance_of(part: Batch) -> Tensor:
        part = part.laid_out(layout)
        distance = part.loss(network(*_mixed_inputs(part, masks)), loss)
        # the masks of this iteration are drawn
        batches.prefetch()
        return distance

    def find_gradients(images: int) -> Tensor:
        variables.drop_gradients()
        return _backward(batches.current(), images, distance_of)

    def iterate(beta: Any, weight: Any, *rates: Any) -> Tensor:
        distance = fitting.run(find_gradients)
        variables.collect_gradients(beta, weight)
        average(parameter.grad for parameter in variables.parameters)
        optimizer.step(rates)
        variables.update()
        return distance

    run = Replay(name, iterate, batches, masks, device) if can_capture(data, options.iterations, device) else iterate
    casting = autocast([layer for layer, _ in weights], AUTOCAST[options.autocast] if options.autocast else None)
    with (
        torch.enable_grad(),
        _dropping(quantizers, masks),
        batches,
        variables.in_force(),
        casting,
        rectified(module) as network,
    ):
        while position < options.iterations:
            progress = position / options.iterations
            batches.begin()
            beta = linear_beta(progress, *options.beta, options.warmup)
            losses[count] = run(beta, options.round_weight, *optimizer.rates(progress))
            count, position = count + 1, position + 1
            if count % CHECK_INTERVAL == 0 or position == options.iterations:
                latest = losses[(count - 1) // CHECK_INTERVAL * CHECK_INTERVAL : count]
                average([latest])
                _check_finite(losses[:count], name)
                mean = float(latest.mean())
                on_step(count, mean)
                if options.plateau > 0 and mean > (1 - options.plateau) * best:
                    position = max(position, end)
                best = min(best, mean)
    variables.finish()
    return count


@torch.no_grad()
def fit_ranges(module: nn.Module, quantizers: Sequence[FakeQuantize], data: UnitData[Any], loss: UnitLoss) -> None:
    """Sets every step size, one after the other, to the multiple with which the unit computes its outputs best.

    Most of a softmax is so small that the squared error of the values is least where all of it is rounded to 0; the
    products with it know better. The first images of ``data`` are looked at, and fixed step sizes stay. Quantization of
    the unit is switched on by the caller.
    """
    batch = data.read(next(iter(batches_of(data.targets[0], RANGE_IMAGES)), slice(0)), floats=False)

    def measure() -> float:
        value = batch.loss(module(*batch.quantized_inputs), loss) if len(batch) else 0.0
        return mean_over(float(value) * len(batch), len(batch))

    best = measure()
    for quantizer in quantizers:
        if quantizer.fixed:
            continue
        scale, zero_point, chosen = quantizer.scale.detach().clone(), quantizer.zero_point.clone(), 1.0
        least = 0.98 * best
        for factor in RANGE_FACTORS:
            quantizer.set_grid(scale * factor, zero_point)
            if (value := measure()) < least:
                least, best, chosen = value, value, factor
        quantizer.set_grid(scale * chosen, zero_point)


def linear_beta(t: float, start: float, end: float, warmup: float) -> float | None:
    """Returns the exponent of AdaRound's regulariser: None during the warm-up, then linear from ``start`` to ``end``.

    Args:
        t: Elapsed fraction of the training.
        start: Exponent after the warm-up; a high one lets variables near 1/2 move freely.
        end: Exponent at the end; 2 pulls every variable to 0 or 1.
        warmup: Fraction of the training without regulariser, in [0, 1).

    Example:
        >>> [linear_beta(t, 20.0, 2.0, warmup=0.2) for t in (0.1, 0.2, 0.6)]
        [None, 20.0, 11.0]
    """
    progress = min(1.0, (t - warmup) / (1 - warmup))
    return None if t < warmup else end + (start - end) * (1 - progress)


def _backward(batch: Batch, images: int, distance_of: Callable[[Batch], Tensor]) -> Tensor:
    """Adds up the gradients of a batch, ``images`` at once, and returns the distance of the outputs.

    A loss is a mean over images, so each part counts by its share of them.
    """
    total: Any = 0
    for part in batch.parts(images):
        distance = distance_of(part)
        if part is batch:
            distance.backward()
            return distance.detach()
        share = len(part) / len(batch)
        (share * distance).backward()
        total = total + share * distance.detach()
    return total


def _check_finite(losses: Tensor, name: str) -> None:
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise NonFiniteError(f"the loss of unit '{name}' is {float(losses[first])} at iteration {first}")


@contextmanager
def _dropping(quantizers: Sequence[FakeQuantize], masks: RandomMasks | None) -> Iterator[None]:
    """Makes quantizers pass the float value on wherever a mask has a zero, within the block."""
    for quantizer in quantizers:
        quantizer.masks = masks
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.masks = None


def _mixed_inputs(batch: Batch, masks: RandomMasks | None) -> Sequence[Tensor]:
    """Returns the inputs of the batch, quantized and float ones mixed element by element, in place."""
    if masks is not None:
        for x, floating in zip(batch.quantized_inputs, batch.float_inputs, strict=True):
            if x is not floating:
                mix_(x, floating, masks.draw(x))
    return batch.quantized_inputs


@contextmanager
def autocast(layers: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Makes the layers multiply in ``dtype``, where given, and return their input's dtype, within the block.

    Only the products are cast: fake quantization, sums of branches, losses and everything that is learned stay in
    float32. Depthwise convolutions stay as they are, for they have no fast kernels in ``dtype`` on a CPU.
    """
    with ExitStack() as stack:
        for layer in layers:
            if dtype is not None and getattr(layer, 'groups', 1) == 1:
                # an attribute of the module hides the method of its class
                layer.forward = _casting(layer.forward, dtype, -1 if isinstance(layer, nn.Linear) else 1)
                stack.callback(delattr, layer, 'forward')
        yield


def _casting(forward: Callable[[Tensor], Tensor], dtype: torch.dtype, channels: int) -> Callable[[Tensor], Tensor]:
    """Returns ``forward`` in ``dtype`` where that pays; ``channels`` is the axis that it sums over."""

    def cast(x: Tensor) -> Tensor:
        if x.device.type == 'cpu' and x.numel() // x.shape[channels] < FEWEST_ROWS:
            return forward(x)
        with torch.autocast(x.device.type, dtype):
            return forward(x).to(x.dtype)

    return cast


_RECTIFIERS: dict[Any, tuple[float, float]] = {
    F.relu: (0.0, math.inf), torch.relu: (0.0, math.inf), 'relu': (0.0, math.inf), F.relu6: (0.0, 6.0),
}  # fmt: skip


@contextmanager
def rectified(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the unit without those of its rectifiers that quantizers compute within the block; itself if it has none.

    Memory, not arithmetic, limits both: together they take one pass over a feature map where they took two, forward and
    backward. Hooks of a rectifier are not called within the block.
    """
    found = _rectifiers_of(module) if isinstance(module, fx.GraphModule) else {}
    if not isinstance(module, fx.GraphModule) or not found:
        yield module
        return
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copies[node.args[0]] if node in found else graph.node_copy(node, copies.__getitem__)
    try:
        for quantizer, bounds in found.values():
            quantizer.rectifier = bounds
        yield graph_module(module, graph, type(module).__name__)
    finally:
        for quantizer, _ in found.values():
            quantizer.rectifier = None


def _rectifiers_of(module: fx.GraphModule) -> dict[fx.Node, tuple[FakeQuantize, tuple[float, float]]]:
    """Returns rectifiers that one enabled quantizer alone reads, which is called nowhere else, with their bounds."""
    calls: dict[FakeQuantize, list[fx.Node]] = {}
    for node in module.graph.nodes:
        called = called_module(module, node)
        if isinstance(called, FakeQuantize) and called.enabled:
            calls.setdefault(called, []).append(node)
    found = {}
    for quantizer, nodes in calls.items():
        rectifier: Any = nodes[0].args[0]
        bounds = _bounds_of(rectifier, module)
        if len(nodes) == 1 and bounds is not None and len(rectifier.users) == 1:
            found[rectifier] = quantizer, bounds
    return found


def _bounds_of(node: fx.Node, module: nn.Module) -> tuple[float, float] | None:
    """Returns the bounds of the values of a rectifier; None for any other node."""
    if node.op in ('call_function', 'call_method'):
        return _RECTIFIERS.get(node.target)
    called = called_module(module, node)
    if type(called) is nn.ReLU:
        return _RECTIFIERS[F.relu]
    return (called.min_val, called.max_val) if type(called) in (nn.ReLU6, nn.Hardtanh) else None
