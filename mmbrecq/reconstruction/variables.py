"""Optimises a unit by Adam: its rounding, scales, biases and the step sizes of its activations are the variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.fake_quants.ops import OutputGradient
from mmbrecq.fake_quants.weight import AdaRound, StraightThrough, WeightFakeQuantize, original, original_weight
from mmbrecq.functional import expand, short_scale
from mmbrecq.kernels.native import Variable, as_array, kernel
from mmbrecq.reconstruction.soft_rounding import SoftRounding, StraightThroughRounding
from mmbrecq.reconstruction.stages import SCALE_LR, Stage
from mmbrecq.reconstruction.values import called_modules, laid_out

SMALLEST = 0.01
"""Fraction of itself that a scale of an activation may shrink to."""

Group = tuple[list[nn.Parameter], float, Callable[[float], float]]
"""Parameters, their learning rate, and its schedule: its factor at the elapsed fraction of the training, in [0, 1)."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """Adam (Kingma and Ba, ICLR 2015), by a compiled kernel where there is one, else by torch's optimizer.

    For a small layer torch's optimizer takes as long as the layer; the kernel is called once for all variables.

    Args:
        groups: What is optimised, at least one group, none of them empty.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> adam = Adam([([weight], 0.1, lambda progress: 1 - progress)])
        >>> weight.grad = torch.tensor([3.0, -5.0])
        >>> adam.step(0.5)
        >>> weight.data
        tensor([0.9500, 1.0500])
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups, self._count = groups, 0
        self._parameters = [parameter for members, _, _ in groups for parameter in members]
        kernels = [kernel('adam', parameter.detach()) for parameter in self._parameters]
        self._run = kernels[0] if all(kernels) else None
        if self._run is None:
            options = [{'params': members, 'lr': lr} for members, lr, _ in groups]
            on_gpu = self._parameters[0].is_cuda
            self._adam = torch.optim.Adam(options, betas=BETAS, eps=EPSILON, fused=True, capturable=on_gpu)
            return
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._parameters]
        self._table = (Variable * len(self._parameters))()
        for variable, parameter, (mean, square) in zip(self._table, self._parameters, self._moments, strict=True):
            variable.value, variable.mean, variable.square = map(as_array, (parameter.detach(), mean, square))

    def rates(self, progress: float) -> list[float]:
        """Returns the learning rates of the groups at ``progress`` through their schedules."""
        return [lr * schedule(progress) for _, lr, schedule in self._groups]

    def step(self, progress: float | Sequence[Any]) -> None:
        """Moves all parameters that have a gradient, with the rates at ``progress`` or, of each group, those given."""
        rates = progress if isinstance(progress, Sequence) else self.rates(progress)
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                # torch's fused optimizer does not look at the order either
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        if self._run is None:
            for group, rate in zip(self._adam.param_groups, rates, strict=True):
                # a scheduler of torch's takes as long as a small layer
                group['lr'] = rate
            self._adam.step()
            return
        self._count += 1
        beta_mean, beta_square = BETAS
        rate_of = [rate for rate, (members, _, _) in zip(rates, self._groups, strict=True) for _ in members]
        for variable, parameter, rate in zip(self._table, self._parameters, rate_of, strict=True):
            variable.grad, variable.rate = as_array(parameter.grad), rate / (1 - beta_mean**self._count)
        root = (1 - beta_square**self._count) ** 0.5
        self._run(len(self._table), self._table, 1 - beta_mean, beta_square, 1 - beta_square, EPSILON, root)


class Variables:
    """The variables of one unit in one pass.

    Plain tensors stand in the place of quantized weights and biases, computed anew after every iteration. Autograd goes
    no further than these: :meth:`collect_gradients` carries their gradients on to what is learned. Where the rounding
    of a layer is not learned, its weight has no gradient at all, and those of scale and bias come from the output of
    the layer.

    Args:
        module: The unit; the layers that its graph calls are known to be seen.
        weights: Modules with a quantized weight and their fake quantizers.
        quantizers: Activation quantizers.
        stage: What is learned, and how.
        layout: Order in memory of the unit's activations and of the weights of its convolutions.

    Attributes:
        alphas: Variables of AdaRound's rounding.
        steps: Those of straight-through rounding.
        gains: Factors on the scales of weights.
        offsets: Corrections of the biases.
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
        self._options, called = stage.options, called_modules(module)
        self._layers = [_Layer(layer, fq, stage, layout, layer in called) for layer, fq in weights]
        self.alphas = [layer.soft.alpha for layer in self._layers if isinstance(layer.soft, SoftRounding)]
        self.steps = [layer.soft.steps for layer in self._layers if isinstance(layer.soft, StraightThroughRounding)]
        self.gains = [layer.gain for layer in self._layers if layer.gain is not None]
        self.offsets = [layer.correction.offset for layer in self._layers if layer.correction is not None]
        learning = [q for q in quantizers if stage.quantizes_activations and not q.fixed]
        self._quantizers = [(q, q.scale) for q in learning if isinstance(q.scale, nn.Parameter)]
        scales = [scale for _, scale in self._quantizers]
        for scale in scales:
            scale.requires_grad_(True)
        rate = self._options.activation_lr
        # those of one network differ too much for one rate
        of_scales: list[Group] = [([scale], SCALE_LR * float(scale.detach().mean()), cosine) for scale in scales]
        groups: list[Group] = [
            (self.alphas, self._options.rounding_lr, lambda t: 1.0),
            (self.steps, self._options.rounding_lr, cosine),
            (self.gains, self._options.weight_scale_lr, cosine),
            (self.offsets, self._options.bias_lr, cosine),
            *(of_scales if rate is None else [(scales, rate, cosine)]),
        ]
        self._floors = [(scale, scale.detach() * SMALLEST) for scale in scales]
        self.groups = [group for group in groups if group[0]]
        self.update()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is optimised."""
        return [parameter for parameters, _, _ in self.groups for parameter in parameters]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Makes the unit compute with the variables, within the block; they stay where they are in memory."""
        with ExitStack() as stack, parametrize.cached():
            for layer in self._layers:
                stack.callback(layer.release)
                layer.fake_quant.learned = layer.weight
                if layer.correction is not None:
                    layer.correction.learned = layer.bias
                if layer.by_output and (layer.gain is not None or layer.correction is not None):
                    stack.callback(layer.module.register_forward_hook(_output_hook(layer)).remove)
            yield

    def drop_gradients(self) -> None:
        """Forgets the gradients of the iteration before, or of a failed attempt."""
        leaves = [x for layer in self._layers for x in (layer.weight, layer.bias) if x is not None]
        for tensor in (*leaves, *self.parameters):
            tensor.grad = None

    def collect_gradients(self, beta: Any, weight: Any = None) -> None:
        """Completes the gradients after a backward pass, with the exponent, if any, and weight of the regulariser."""
        with torch.no_grad():
            for layer in self._layers:
                layer.collect(beta, self._options.round_weight if weight is None else weight)

    def update(self) -> None:
        """Computes with what the optimiser has changed; no scale of an activation gets to 0 or below."""
        with torch.no_grad():
            for scale, floor in self._floors:
                torch.maximum(scale, floor, out=scale)
            for layer in self._layers:
                layer.update()

    def finish(self) -> None:
        """Fixes what was learned."""
        for layer in self._layers:
            layer.finish()
        for quantizer, scale in self._quantizers:
            quantizer.set_grid(scale.detach(), quantizer.zero_point)
            scale.requires_grad_(False)
            scale.grad = None


class _Layer:
    """What is learned of one layer; its ``weight`` and ``bias`` are leaves of autograd."""

    def __init__(
        self, module: nn.Module, fake_quant: WeightFakeQuantize, stage: Stage, layout: torch.memory_format, called: bool
    ) -> None:
        self.module, self.fake_quant, scale = module, fake_quant, stage.options.weight_scale_lr > 0
        self.soft: SoftRounding | StraightThroughRounding | None = None
        self.bias: Tensor | None = None
        if stage.learns_rounding and isinstance(fake_quant, AdaRound):
            self.soft = SoftRounding(fake_quant, original_weight(module), layout)
        elif stage.learns_rounding and isinstance(fake_quant, StraightThrough):
            self.soft = StraightThroughRounding(fake_quant, original_weight(module), layout)
        # a soft weight is written anew before it is multiplied, so it needs no second tensor
        self.values = laid_out(self.soft.weight if self.soft else fake_quant.values, layout)
        # the factor on its scale: the integers do not follow it, it stretches the grid under them
        self.gain: nn.Parameter | None = None
        if scale:
            ones = expand(torch.ones_like(fake_quant.scale), self.values.dim(), fake_quant.qtype.ch_axis)
            self.gain = nn.Parameter(ones.clone())
        # whether all gradients are found from the output of the layer
        self.by_output = self.soft is None and called and _is_per_output(fake_quant, module)
        weight = torch.empty_like(self.values) if scale and not self.soft else self.values
        self.weight = weight.detach().requires_grad_((scale or self.soft is not None) and not self.by_output)
        self.correction = bias_correction(module) if stage.options.bias_lr > 0 else None
        if self.correction is not None:
            self.correction.offset.requires_grad_(True)
            self.bias = original(module, 'bias').clone().requires_grad_(not self.by_output)

    def update(self) -> None:
        """Computes weight and bias anew, from what is learned."""
        if self.soft is not None:
            self.soft.update(self.gain)
        elif self.gain is not None:
            torch.mul(self.values, self.gain, out=self.weight.detach())
        if self.bias is not None and self.correction is not None:
            torch.add(original(self.module, 'bias'), self.correction.offset, out=self.bias.detach())

    def collect(self, beta: Any, round_weight: Any) -> None:
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
            self.soft.finish()
        if self.gain is not None:
            scale = self.fake_quant.scale
            scale.copy_(short_scale(scale * self.gain.detach().reshape(scale.shape)))
        if self.correction is not None:
            self.correction.offset.requires_grad_(False)
            self.correction.offset.grad = None


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


def cosine(t: float) -> float:
    """Returns the factor of a learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, t)))
