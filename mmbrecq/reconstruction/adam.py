"""Adam (Kingma and Ba, ICLR 2015) over the variables of a unit.

For a small layer torch's optimizer takes as long as the layer. Where there are compiled kernels, a step is one call for
each group of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmbrecq.kernels.native import AdamStep, Kernels, Variable, kernels, takes

Group = tuple[list[nn.Parameter], float, Callable[[float], float]]
"""Parameters, their learning rate, and its schedule."""

Ahead = tuple[tuple[Tensor, Tensor], AdamStep]
"""The moments of a parameter, and its next step."""

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def build_adam(groups: Sequence[Group]) -> Adam:
    """The fastest that the parameters allow.

    Args:
        groups: At least one, none of them empty.
    """
    parameters = [parameter for members, _, _ in groups for parameter in members]
    native = kernels() if all(takes(parameter.detach()) for parameter in parameters) else None
    return TorchAdam(groups) if native is None else NativeAdam(groups, native)


class TorchAdam:
    """That of torch.

    Args:
        groups: What is optimised.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        parameters = [{'params': members, 'lr': lr} for members, lr, _ in groups]
        # on the CPU the fused step came with torch 2.4
        version = tuple(int(part) for part in torch.__version__.split('.')[:2])
        fused = groups[0][0][0].device.type == 'cuda' or version >= (2, 4)
        self._adam = torch.optim.Adam(parameters, betas=BETAS, eps=EPSILON, fused=fused)

    def begin(self, progress: float) -> None:
        """Begins a step, with the learning rates at ``progress``, from 0 to 1, through the schedules."""
        for group, (_, lr, schedule) in zip(self._adam.param_groups, self._groups, strict=True):
            # a scheduler of torch's takes as long as a small layer
            group['lr'] = lr * schedule(progress)

    def ahead(self, parameter: nn.Parameter) -> Ahead | None:
        """What it takes to make the step of a parameter where its gradient is found; None where that cannot be."""
        return None

    def step(self) -> None:
        """Moves all parameters that have a gradient."""
        self._adam.step()


class NativeAdam:
    """By a compiled kernel: one call for all parameters of a group.

    Args:
        groups: What is optimised; float32 on the CPU.
        native: The kernels.
    """

    def __init__(self, groups: Sequence[Group], native: Kernels) -> None:
        self._groups = [_NativeGroup(members, lr, schedule) for members, lr, schedule in groups]
        self._native, self._count = native, 0

    def begin(self, progress: float) -> None:
        """Begins a step, with the learning rates at ``progress``, from 0 to 1, through the schedules."""
        self._count += 1
        for group in self._groups:
            group.next = AdamStep.at(self._count, group.lr * group.schedule(progress), BETAS, EPSILON)

    def ahead(self, parameter: nn.Parameter) -> Ahead | None:
        """What it takes to make the step of a parameter where its gradient is found; None where that cannot be."""
        for group in self._groups:
            for member, moments in zip(group.members, group.moments, strict=True):
                if member is parameter:
                    return moments, group.next
        return None

    def step(self) -> None:
        """Moves all parameters that have a gradient."""
        for group in self._groups:
            group.read_gradients()
            self._native.adam(group.table, group.next)


class _NativeGroup:
    """Some parameters with the same learning rate, their moments, and the table of both that a kernel reads."""

    def __init__(self, members: Sequence[nn.Parameter], lr: float, schedule: Callable[[float], float]) -> None:
        self.members, self.lr, self.schedule = members, lr, schedule
        self.next = AdamStep()
        self.moments = [(torch.zeros_like(member), torch.zeros_like(member)) for member in members]
        self.table = (Variable * len(members))()
        for variable, member, (mean, square) in zip(self.table, members, self.moments, strict=True):
            variable.count, variable.value = member.numel(), member.data_ptr()
            variable.mean, variable.square = mean.data_ptr(), square.data_ptr()

    def read_gradients(self) -> None:
        """Takes up where the gradients lie."""
        for variable, member in zip(self.table, self.members, strict=True):
            grad = member.grad
            if grad is not None and not takes(member, grad):
                grad = member.grad = torch.empty_like(member).copy_(grad)
            variable.grad = None if grad is None else grad.data_ptr()


Adam = TorchAdam | NativeAdam
