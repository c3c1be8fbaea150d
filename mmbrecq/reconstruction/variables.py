"""What is optimised in a unit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import fx, nn

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.weight import WeightFakeQuantize
from mmbrecq.reconstruction.adam import Adam, Group
from mmbrecq.reconstruction.learned_weights import LearnedWeights
from mmbrecq.reconstruction.schedules import constant, cosine
from mmbrecq.reconstruction.stages import Stage

SMALLEST = 0.01
"""What a scale of an activation may shrink to, of what it was."""


class Variables:
    """The variables of one unit in one stage.

    Args:
        module: The unit.
        weights: Modules with a quantized weight and their fake quantizers.
        quantizers: Activation quantizers.
        stage: What is learned, and how.
        layout: Order in memory of the unit's activations.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Sequence[tuple[nn.Module, WeightFakeQuantize]],
        quantizers: Sequence[FakeQuantize],
        stage: Stage,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        options = stage.options
        self._options = options
        self.weights = LearnedWeights(
            weights, stage.learns_rounding, options.weight_scale_lr > 0, options.bias_lr > 0, layout, _called(module)
        )
        self._quantizers = [q for q in quantizers if not q.fixed] if stage.learns_scale else []
        scales = [p for q in self._quantizers for p in q.start()]
        groups: list[Group] = [
            (self.weights.alphas, options.lr, constant),
            (self.weights.gains, options.weight_scale_lr, cosine),
            (self.weights.offsets, options.bias_lr, cosine),
            (scales, options.activation_lr, cosine),
        ]
        self._floors = [(scale, scale.detach() * SMALLEST) for scale in scales]
        self.groups = [group for group in groups if group[0]]

    def in_force(self) -> AbstractContextManager[None]:
        """The unit computes with the variables."""
        return self.weights.in_force()

    def drop_gradients(self) -> None:
        """Forgets the gradients of the step before, or of a failed attempt."""
        self.weights.drop_gradients()
        for parameters, _, _ in self.groups:
            for parameter in parameters:
                parameter.grad = None

    def collect_gradients(self, beta: float | None, optimizer: Adam | None = None) -> None:
        """Completes the gradients after a backward pass.

        Args:
            beta: Exponent of the regulariser; None for none.
            optimizer: One that may step ahead with variables whose gradients nobody else wants.
        """
        ahead = optimizer.ahead(self.weights.alphas[0]) if optimizer is not None and self.weights.alphas else None
        self.weights.collect(beta, self._options.round_weight, ahead)

    def update(self) -> None:
        """Takes over what a step of the optimizer has changed; no scale of an activation gets to 0 or below."""
        with torch.no_grad():
            for scale, floor in self._floors:
                torch.maximum(scale, floor, out=scale)
        self.weights.update()

    def finish(self) -> None:
        """Fixes what was learned."""
        self.weights.finish()
        for quantizer in self._quantizers:
            quantizer.finish()


def _called(module: nn.Module) -> set[nn.Module]:
    """The modules that a graph calls; none are known of a module that is no graph."""
    graph = getattr(module, 'graph', None)
    if not isinstance(graph, fx.Graph):
        return set()
    return {module.get_submodule(str(node.target)) for node in graph.nodes if node.op == 'call_module'}
