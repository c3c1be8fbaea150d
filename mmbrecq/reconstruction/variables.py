"""What is optimised in a unit: rounding, scales and biases of its layers, and step sizes of its activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.fake_quants.ops import OutputGradient
from mmbrecq.fake_quants.weight import AdaRound, WeightFakeQuantize, original_weight
from mmbrecq.reconstruction.schedules import constant, cosine
from mmbrecq.reconstruction.soft_rounding import SoftRounding, learn_rounding
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.reconstruction.values import laid_out

SMALLEST = 0.01
"""Fraction of itself that a scale of an activation may shrink to."""

Group = tuple[list[nn.Parameter], float, Callable[[float], float]]
"""Parameters, their learning rate, and its schedule."""


class Variables:
    """The variables of one unit in one pass.

    Args:
        module: The unit.
        weights: Modules with a quantized weight and their fake quantizers.
        quantizers: Activation quantizers.
        stage: What is learned, and how.
        layout: Order in memory of the unit's activations.

    Attributes:
        weights (LearnedWeights): The variables of the layers.
        groups: What is optimised, none of them empty.
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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is optimised."""
        return [parameter for parameters, _, _ in self.groups for parameter in parameters]

    def in_force(self) -> AbstractContextManager[None]:
        """Makes the unit compute with the variables, within the block."""
        return self.weights.in_force()

    def drop_gradients(self) -> None:
        """Forgets the gradients of the iteration before, or of a failed attempt."""
        self.weights.drop_gradients()
        for parameter in self.parameters:
            parameter.grad = None

    def collect_gradients(self, beta: float | None) -> None:
        """Completes the gradients after a backward pass; ``beta`` is the regulariser's exponent, None for none."""
        self.weights.collect(beta, self._options.round_weight)

    def update(self) -> None:
        """Computes with what the optimiser has changed; no scale of an activation gets to 0 or below."""
        with torch.no_grad():
            for scale, floor in self._floors:
                torch.maximum(scale, floor, out=scale)
        self.weights.update()

    def finish(self) -> None:
        """Fixes what was learned."""
        self.weights.finish()
        for quantizer in self._quantizers:
            quantizer.finish()


class _Layer:
    """What is learned of one layer, see :class:`LearnedWeights`; ``weight`` and ``bias`` are leaves of autograd."""

    def __init__(
        self,
        module: nn.Module,
        fake_quant: WeightFakeQuantize,
        rounding: bool,
        scale: bool,
        bias: bool,
        layout: torch.memory_format,
        called: bool,
    ) -> None:
        self.module, self.fake_quant = module, fake_quant
        self.soft: SoftRounding | None = None
        self.bias: Tensor | None = None
        if rounding and isinstance(fake_quant, AdaRound):
            fake_quant.start(original_weight(module))
            self.soft = learn_rounding(fake_quant, layout)
        # a soft weight is written anew before it is multiplied, so it needs no second tensor
        quantized = self.soft.weight if self.soft else fake_quant.quantized(original_weight(module))
        self.values = laid_out(quantized, layout)
        if scale:
            fake_quant.start_scale(original_weight(module))
        # whether all gradients are found from the output of the layer
        self.by_output = self.soft is None and called and _is_per_output(fake_quant, module)
        weight = torch.empty_like(self.values) if scale and not self.soft else self.values
        self.weight = weight.detach().requires_grad_((scale or self.soft is not None) and not self.by_output)
        self.correction = bias_correction(module) if bias else None
        if self.correction is not None:
            self.correction.offset.requires_grad_(True)
            self.bias = _original_bias(module).clone().requires_grad_(not self.by_output)

    @property
    def gain(self) -> nn.Parameter | None:
        """The factor on its scale, None where none is learned."""
        return self.fake_quant.gain

    def update(self) -> None:
        """Computes weight and bias anew, from what is learned."""
        if self.soft is not None:
            self.soft.update(self.gain)
        elif self.gain is not None:
            torch.mul(self.values, self.gain, out=self.weight.detach())
        if self.bias is not None and self.correction is not None:
            torch.add(_original_bias(self.module), self.correction.offset, out=self.bias.detach())

    def collect(self, beta: float | None, round_weight: float) -> None:
        """Carries the gradients of weight and bias on to what is learned."""
        grad, self.weight.grad = self.weight.grad, None
        if self.soft is not None:
            self.soft.collect(grad, self.gain, beta, round_weight)
        elif self.gain is not None and grad is not None:
            # over the axes of the gain that are 1
            self.gain.grad = (grad * self.values).sum_to_size(self.gain.shape)
        if self.bias is not None and self.correction is not None and self.bias.requires_grad:
            self.correction.offset.grad, self.bias.grad = self.bias.grad, None

    def release(self) -> None:
        """Makes the module compute its own weight and bias again."""
        self.fake_quant.learned = None
        if self.correction is not None:
            self.correction.learned = None

    def finish(self) -> None:
        """Fixes what was learned."""
        if self.soft is not None:
            self.fake_quant.finish()
        if self.gain is not None:
            self.fake_quant.finish_scale()
        if self.correction is not None:
            self.correction.offset.requires_grad_(False)
            self.correction.offset.grad = None


class LearnedWeights:
    """Plain tensors in the place of quantized weights and biases, computed anew after every iteration.

    Autograd goes no further than these tensors: :meth:`collect` carries their gradients on to what is learned. Where
    the rounding of a layer is not learned, its weight has no gradient at all, and those of scale and bias come from the
    output of the layer.

    Args:
        weights: Modules with a quantized weight and their fake quantizers.
        rounding: Whether rounding is learned, where it can be.
        scales: Whether a factor on every scale is learned.
        biases: Whether corrections of biases are learned.
        layout: Order in memory of the weights of convolutions.
        called: Modules known to be called, so that their outputs are seen.
    """

    def __init__(
        self,
        weights: Sequence[tuple[nn.Module, WeightFakeQuantize]],
        rounding: bool,
        scales: bool,
        biases: bool,
        layout: torch.memory_format = torch.contiguous_format,
        called: Collection[nn.Module] = (),
    ) -> None:
        self._layers = [
            _Layer(module, fq, rounding, scales, biases, layout, module in called) for module, fq in weights
        ]
        self.update()

    @property
    def alphas(self) -> list[nn.Parameter]:
        """Variables of the rounding of all layers."""
        return [layer.soft.alpha for layer in self._layers if layer.soft is not None]

    @property
    def gains(self) -> list[nn.Parameter]:
        """Factors on the scales."""
        return [layer.gain for layer in self._layers if layer.gain is not None]

    @property
    def offsets(self) -> list[nn.Parameter]:
        """Corrections of the biases."""
        return [layer.correction.offset for layer in self._layers if layer.correction is not None]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Makes the modules use the learned tensors, within the block; what is learned stays where it is in memory."""
        with ExitStack() as stack, parametrize.cached():
            for layer in self._layers:
                stack.callback(layer.release)
                layer.fake_quant.learned = layer.weight
                if layer.correction is not None:
                    layer.correction.learned = layer.bias
                if layer.by_output and (layer.gain is not None or layer.correction is not None):
                    stack.callback(layer.module.register_forward_hook(_output_hook(layer)).remove)
            yield

    def update(self) -> None:
        """Computes weights and biases anew, from what is learned."""
        with torch.no_grad():
            for layer in self._layers:
                layer.update()

    def drop_gradients(self) -> None:
        """Forgets gradients that were not collected."""
        for layer in self._layers:
            layer.weight.grad = None
            if layer.bias is not None:
                layer.bias.grad = None

    def collect(self, beta: float | None, round_weight: float) -> None:
        """Carries the gradients of the last backward pass on to what is learned, that of the regulariser added.

        Args:
            beta: Exponent of the regulariser; None for no regulariser.
            round_weight: Its weight.
        """
        with torch.no_grad():
            for layer in self._layers:
                layer.collect(beta, round_weight)

    def finish(self) -> None:
        """Fixes what was learned."""
        for layer in self._layers:
            layer.finish()


def _output_hook(layer: _Layer) -> Any:
    axis = -1 if isinstance(layer.module, nn.Linear) else 1

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        offset = None if layer.correction is None else layer.correction.offset
        bias = layer.bias if layer.correction is not None else getattr(module, 'bias', None)
        return OutputGradient.apply(output, layer.gain, offset, bias, axis)

    return hook


def _is_per_output(fake_quant: WeightFakeQuantize, module: Any) -> bool:
    """Returns whether a layer has one scale, or one for every channel of its output."""
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    return fake_quant.scale.numel() in (1, channels)


def _original_bias(module: Any) -> Tensor:
    """Returns the bias without its correction."""
    bias: Tensor = module.parametrizations['bias'].original
    return bias.detach()


def _called(module: nn.Module) -> set[nn.Module]:
    """Returns the modules that a graph calls; none are known of a module that is no graph."""
    graph = getattr(module, 'graph', None)
    if not isinstance(graph, fx.Graph):
        return set()
    return {module.get_submodule(str(node.target)) for node in graph.nodes if node.op == 'call_module'}
