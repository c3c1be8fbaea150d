"""Adam over the variables of a unit."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mmbrecq.kernels.native import Variable, as_array, kernel

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
