"""Adam (Kingma and Ba, ICLR 2015) over the variables of a unit.

For a small layer torch's optimizer takes as long as the layer. Where there are compiled kernels, a group of parameters
is one vector, and a step one pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.native import AdamStep, Kernels, kernels, takes

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

    def finish(self) -> None:
        """Ends the optimisation."""


class NativeAdam:
    """By a compiled kernel: a group is one vector, of which its parameters are views until the end.

    Args:
        groups: What is optimised; float32 on the CPU.
        native: The kernels.
    """

    def __init__(self, groups: Sequence[Group], native: Kernels) -> None:
        self._vectors = [_Vector(members, lr, schedule) for members, lr, schedule in groups]
        self._native, self._count = native, 0

    def begin(self, progress: float) -> None:
        """Begins a step, with the learning rates at ``progress``, from 0 to 1, through the schedules."""
        self._count += 1
        for vector in self._vectors:
            vector.next = AdamStep.at(self._count, vector.lr * vector.schedule(progress), BETAS, EPSILON)

    def ahead(self, parameter: nn.Parameter) -> Ahead | None:
        """What it takes to make the step of a parameter where its gradient is found; None where that cannot be."""
        vector = next((v for v in self._vectors if len(v.members) == 1 and v.members[0] is parameter), None)
        return None if vector is None else (vector.moments, vector.next)

    def step(self) -> None:
        """Moves all parameters but groups without a gradient."""
        for vector in self._vectors:
            grad = vector.grad()
            if grad is not None:
                self._native.adam_(vector.values, grad, vector.moments, vector.next)

    def finish(self) -> None:
        """Ends the optimisation: every parameter has its own memory again."""
        for vector in self._vectors:
            vector.part()


class _Vector:
    """The parameters of a group, one behind the other."""

    def __init__(self, members: Sequence[nn.Parameter], lr: float, schedule: Callable[[float], float]) -> None:
        self.members, self.lr, self.schedule = members, lr, schedule
        self.next = AdamStep()
        if len(members) == 1:
            self.values = members[0].detach().view(-1)
        else:
            self.values = torch.cat([member.detach().reshape(-1) for member in members])
            parts = self.values.split([member.numel() for member in members])
            for member, part in zip(members, parts, strict=True):
                member.data = part.view(member.shape)
        self.moments = torch.zeros_like(self.values), torch.zeros_like(self.values)

    def grad(self) -> Tensor | None:
        """The gradients, 0 where a parameter took no part; None where none did."""
        if len(self.members) == 1:
            grad = self.members[0].grad
            return None if grad is None else grad.reshape(-1)
        if all(member.grad is None for member in self.members):
            return None
        return torch.cat([(torch.zeros_like(m) if m.grad is None else m.grad).reshape(-1) for m in self.members])

    def part(self) -> None:
        """Gives every parameter its own memory."""
        if len(self.members) > 1:
            for member in self.members:
                member.data = member.data.clone()


Adam = TorchAdam | NativeAdam
