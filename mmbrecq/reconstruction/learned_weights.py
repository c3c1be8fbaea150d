"""The weights and biases of a unit while something about them is learned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.bias import BiasCorrection, bias_correction
from mmbrecq.fake_quants.ops import OutputGradient
from mmbrecq.fake_quants.weight import AdaRound, WeightFakeQuantize, original_weight
from mmbrecq.reconstruction.adam import Ahead
from mmbrecq.reconstruction.layout import laid_out
from mmbrecq.reconstruction.soft_rounding import learn_rounding


@dataclass
class _Layer:
    """One layer.

    Args:
        module: The convolution or linear layer.
        fake_quant: Of its weight.
        values (Tensor): The quantized weight without ``gain``.
        weight (Tensor): The quantized weight, a leaf of autograd; ``values`` itself where there is no ``gain``.
        gain: The factor on its scale, None where none is learned.
        correction: Of its bias, None where none is learned.
        offset: What the correction adds.
        plain_bias (Tensor | None): The bias without it.
        bias (Tensor | None): The corrected bias, a leaf of autograd.
        soft: Index of its rounding, None where that is not learned.
    """

    module: nn.Module
    fake_quant: WeightFakeQuantize
    values: Tensor
    weight: Tensor
    gain: nn.Parameter | None
    correction: BiasCorrection | None
    offset: nn.Parameter | None
    plain_bias: Tensor | None
    bias: Tensor | None
    soft: int | None

    @property
    def by_output(self) -> bool:
        """Whether all gradients are taken from the output of the layer."""
        return not self.weight.requires_grad


class LearnedWeights:
    """Plain tensors in the place of quantized weights and biases, computed anew after every step.

    Autograd goes no further than these tensors: :meth:`collect` carries their gradients on to what is learned, all
    layers at once where it can. Where the rounding of a layer is not learned, its weight has no gradient at all, and
    those of scale and bias come from the output of the layer.

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
        roundings = [fq for _, fq in weights if isinstance(fq, AdaRound)] if rounding else []
        for module, fq in weights:
            if fq in roundings:
                fq.start(original_weight(module))
        self.rounding = learn_rounding(roundings, layout) if roundings else None
        self._layers = []
        for module, fq in weights:
            soft = roundings.index(fq) if fq in roundings else None
            values = laid_out(fq.quantized(original_weight(module)), layout)
            if soft is not None:
                assert self.rounding is not None
                values = self.rounding.weights[soft]
            if scales:
                fq.start_scale(original_weight(module))
            correction = bias_correction(module) if biases else None
            by_output = soft is None and module in called and _is_per_output(fq, module)
            self._layers.append(_layer(module, fq, values, correction, soft, by_output))
        self._soft = [layer for layer in self._layers if layer.soft is not None]
        if self.rounding is not None:
            self.rounding.multiply_by([layer.gain for layer in self._soft])
        self.update()

    @property
    def alphas(self) -> list[nn.Parameter]:
        """Variables of the rounding of all layers."""
        return [] if self.rounding is None else [self.rounding.alpha]

    @property
    def gains(self) -> list[nn.Parameter]:
        """Factors on the scales."""
        return [layer.gain for layer in self._layers if layer.gain is not None]

    @property
    def offsets(self) -> list[nn.Parameter]:
        """Corrections of the biases."""
        return [layer.offset for layer in self._layers if layer.offset is not None]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The modules use the learned tensors; what is learned stays where it lies in memory."""
        with ExitStack() as stack, parametrize.cached():
            for layer in self._layers:
                stack.callback(_let_go, layer)
                layer.fake_quant.learned = layer.weight
                if layer.correction is not None:
                    layer.correction.learned = layer.bias
                if layer.by_output and (layer.gain is not None or layer.offset is not None):
                    stack.callback(layer.module.register_forward_hook(_output_hook(layer)).remove)
            yield

    def update(self) -> None:
        """Computes weights and biases anew, from what is learned."""
        with torch.no_grad():
            if self.rounding is not None:
                self.rounding.update()
            for layer in self._layers:
                if layer.gain is not None and layer.soft is None:
                    torch.mul(layer.values, layer.gain, out=layer.weight.detach())
                if layer.bias is not None:
                    assert layer.plain_bias is not None and layer.offset is not None
                    torch.add(layer.plain_bias, layer.offset, out=layer.bias.detach())

    def drop_gradients(self) -> None:
        """Forgets gradients that were not collected."""
        for layer in self._layers:
            layer.weight.grad = None
            if layer.bias is not None:
                layer.bias.grad = None

    def collect(self, beta: float | None, round_weight: float, ahead: Ahead | None = None) -> None:
        """Carries the gradients of the last backward pass on to what is learned, that of the regulariser added.

        Args:
            beta: Exponent of the regulariser; None for none.
            round_weight: Its weight.
            ahead: The step that the variables of the rounding may take at once.
        """
        with torch.no_grad():
            grads = [layer.weight.grad for layer in self._soft]
            for layer in self._layers:
                gain, grad = layer.gain, layer.weight.grad
                if gain is not None and grad is not None and layer.soft is None:
                    # over the axes of the gain that are 1
                    gain.grad = (grad * layer.values).sum_to_size(gain.shape)
                layer.weight.grad = None
                if layer.bias is not None and layer.offset is not None and layer.bias.requires_grad:
                    layer.offset.grad, layer.bias.grad = layer.bias.grad, None
            if self.rounding is not None:
                self.rounding.collect(grads, beta, round_weight, ahead)

    def finish(self) -> None:
        """Fixes what was learned."""
        for layer in self._layers:
            if layer.soft is not None:
                layer.fake_quant.finish()
            if layer.fake_quant.gain is not None:
                layer.fake_quant.finish_scale()
            if layer.correction is not None:
                layer.correction.offset.requires_grad_(False)
                layer.correction.offset.grad = None


def _layer(
    module: nn.Module,
    fake_quant: WeightFakeQuantize,
    values: Tensor,
    correction: BiasCorrection | None,
    soft: int | None,
    by_output: bool,
) -> _Layer:
    offset = plain_bias = bias = None
    if correction is not None:
        offset, plain_bias = correction.offset, _original_bias(module)
        offset.requires_grad_(True)
        bias = plain_bias.clone().requires_grad_(not by_output)
    # a soft weight is written anew before it is multiplied, so it needs no second tensor
    apart = fake_quant.gain is not None and soft is None
    weight = (torch.empty_like(values) if apart else values).detach()
    learned = fake_quant.gain is not None or soft is not None
    weight.requires_grad_(learned and not by_output)
    return _Layer(
        module, fake_quant, values, weight, fake_quant.gain, correction, offset, plain_bias, bias, soft
    )  # fmt: skip


def _let_go(layer: _Layer) -> None:
    layer.fake_quant.learned = None
    if layer.correction is not None:
        layer.correction.learned = None


def _output_hook(layer: _Layer) -> Any:
    axis = -1 if isinstance(layer.module, nn.Linear) else 1

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        offset = None if layer.correction is None else layer.correction.offset
        bias = layer.bias if layer.correction is not None else getattr(module, 'bias', None)
        return OutputGradient.apply(output, layer.fake_quant.gain, offset, bias, axis)

    return hook


def _is_per_output(fake_quant: WeightFakeQuantize, module: Any) -> bool:
    """Whether a layer has one scale, or one for every channel of its output."""
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    return fake_quant.scale.numel() in (1, channels)


def _original_bias(module: Any) -> Tensor:
    """The bias without its correction."""
    bias: Tensor = module.parametrizations['bias'].original
    return bias.detach()
