"""The loss of quantized layers and activations: the distance of the network's outputs from the float ones."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_regions
from mmbrecq.data.groups import Images, batches_of, joined
from mmbrecq.distributed import gather, mean_over
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.progress import track
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel
from mmbrecq.reconstruction.losses import TaskLoss, visit_task_losses
from mmbrecq.reconstruction.task import Task

BATCH = 64
"""Images per pass."""
FISHER = 'Fisher-weighted error'
"""The kind of loss that the annotations of the images weigh."""


class OutputLoss:
    """Distance of the outputs of a graph from its float outputs, over given inputs.

    For scores of classes, one output ``(N, C)``, it is the mean divergence ``KL(float || quantized)`` of their softmax.
    For maps it is the sum over the outputs of the mean square of their errors, each over the mean square of the float
    output: scores and box offsets differ in scale. With ``squared_gradients`` it is what the task loss of an image
    rises by, to second order by the diagonal of the Fisher information: the mean over the images of
    ``0.5 * sum(gradient^2 * error^2)`` over all elements of all outputs.

    Args:
        graph: A prepared graph.
        inputs: ``(N, ...)`` images, or features of regions; of several processes each has its own.
        squared_gradients: Of the task loss at each output, of the output's shape, see :func:`squared_gradients`.
    """

    def __init__(
        self, graph: QuantizedGraph, inputs: Images, squared_gradients: Sequence[Images] | None = None
    ) -> None:
        self._graph, self._inputs = graph, inputs
        with graph.quantization(weights=False, activations=False):
            self._targets = list(self._outputs())
            # of several processes one may have no image
            outputs = self._targets[0] if self._targets else _flat(graph(torch.zeros_like(graph.traced.example[:1])))
        self.kind = 'divergence' if len(outputs) == 1 and outputs[0].dim() == 2 else 'distance'
        if squared_gradients is not None:
            self.kind = FISHER
            # one weight per element, batch by batch
            self._weights = [[weight[batch] for weight in squared_gradients] for batch in batches_of(inputs, BATCH)]
        own = [float(sum(batch[i].square().sum() for batch in self._targets)) for i in range(len(outputs))]
        self._power = [sum(parts) for parts in zip(*gather(own), strict=True)]

    def of(self, layers: Collection[str], quantizers: Collection[str] = ()) -> float:
        """The loss with the weights of ``layers`` and activations of ``quantizers`` quantized, all else in float."""
        with self._graph.quantization(layers, quantizers):
            total = sum(self._batch_loss(outputs, index) for index, outputs in enumerate(self._outputs()))
        return sum(gather(total)) if self.kind == 'distance' else mean_over(total, len(self._inputs))

    def _batch_loss(self, outputs: Sequence[Tensor], index: int) -> float:
        targets = self._targets[index]
        if self.kind == FISHER:
            rows = zip(outputs, targets, self._weights[index], strict=True)
            return 0.5 * sum(float(((o - t).square() * weight).sum(dtype=torch.float64)) for o, t, weight in rows)
        if self.kind == 'divergence':
            wanted, found = F.log_softmax(targets[0].double(), 1), F.log_softmax(outputs[0].double(), 1)
            return float(F.kl_div(found, wanted, reduction='sum', log_target=True))
        errors = [float((o - t).square().sum()) for o, t in zip(outputs, targets, strict=True)]
        return sum(error / max(power, 1e-12) for error, power in zip(errors, self._power, strict=True))

    @torch.no_grad()
    def _outputs(self) -> Iterator[list[Tensor]]:
        for batch in batches_of(self._inputs, BATCH):
            yield _flat(self._graph(self._inputs[batch]))


def output_loss(task: Task, graph: QuantizedGraph, images: int | None, kind: str) -> OutputLoss:
    """Builds the loss of one graph of a task, over its first ``images``, None for all, or over all features of regions.

    With the kind :data:`FISHER` the task has a task loss, and the annotations of the images weigh the errors.
    """
    inputs = task.regions.pairs(graph, False, False)[0] if graph.is_region else task.images[:images]
    if kind != FISHER:
        return OutputLoss(graph, inputs)
    assert task.task_loss is not None
    return OutputLoss(graph, inputs, squared_gradients(task.model, task.batches(), inputs, task.task_loss))


def squared_gradients(
    model: QuantizedModel, batches: Iterable[Any], images: Images, task_loss: TaskLoss
) -> list[Images]:
    """Returns the squared gradients of the float network's task loss at each of its outputs, of the output's shape.

    The arguments are those of :func:`~mmbrecq.reconstruction.losses.visit_task_losses`.
    """
    outputs: list[Tensor] = []

    def record(inputs: Tensor) -> Any:
        found = model.image_graph.compiled(inputs)
        outputs[:] = _flat(found)
        return found

    def square(loss: Tensor, index: slice) -> None:
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        squares.append([gradient.square() for gradient in gradients])

    squares: list[list[Tensor]] = []
    visit_task_losses(model, batches, images, task_loss, record, square)
    return [joined(parts) for parts in zip(*squares, strict=True)]


def _flat(outputs: Any) -> list[Tensor]:
    return list(flatten_outputs(outputs).values())


def measure_activations(task: Task, table: SensitivityTable, bits: int) -> None:
    """Measures the groups of ``table.values`` that have no loss at ``bits`` yet.

    The task was prepared with activations of these bits. Their grids are those of a calibration on float values; the
    loss is that with one group quantized, all else float.
    """
    calibrate_activations(task.model, (task.images[batch] for batch in batches_of(task.images, BATCH)))
    calibrate_regions(task.model, task.regions)
    for part in task.model.graphs:
        own = [name for name, group in table.values.items() if set(group.quantizers) <= set(part.quantizers)]
        missing = [name for name in own if bits not in table.activation_loss.get(name, {})]
        if missing:
            loss = output_loss(task, part, table.images, table.kind)
            for name in track(missing, f'activations at {bits} bits'):
                quantizers = table.values[name].quantizers
                table.activation_loss.setdefault(name, {})[bits] = loss.of((), quantizers)
