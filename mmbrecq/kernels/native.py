"""The arithmetic of a training step in compiled form, where there is a C compiler.

A chain of torch's operations reads and writes each tensor a dozen times, which for large weights and small images
takes longer than the convolutions. Compiling takes a third of a second, when the first kernel is wanted. Without a
compiler, on other devices and for other dtypes torch's operations do the same.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmbrecq.errors import first_line

SOURCE = Path(__file__).with_name('kernels.c')
FLAGS = ('-O3', '-march=native', '-fopenmp', '-fno-math-errno', '-fno-trapping-math', '-shared', '-fPIC')
SWITCH = 'MMBRECQ_KERNELS'
"""Environment variable: 0 for torch's operations alone."""
BLOCK = 4096
"""Elements of a partial sum; that of the source."""
UNBOUNDED = (-math.inf, math.inf)
"""A rectifier that leaves everything as it is."""

_COUNT, _TENSOR, _NUMBER = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Curve(ctypes.Structure):
    """A rectified sigmoid ``h = sigma * stretch + gamma``, and the ``sigma`` where it is 0, 1/2 and 1."""

    _fields_ = [(name, _NUMBER) for name in ('gamma', 'stretch', 'low', 'half', 'high')]


class AdamStep(ctypes.Structure):
    """A step of Adam (Kingma and Ba, ICLR 2015), as torch takes it.

    ``rate`` is the learning rate over the correction of the first moment, ``root`` the root of that of the second,
    ``rest_mean`` and ``rest_square`` are 1 less their decay.
    """

    _fields_ = [(name, _NUMBER) for name in ('rate', 'rest_mean', 'beta_square', 'rest_square', 'epsilon', 'root')]

    @classmethod
    def at(cls, count: int, lr: float, betas: tuple[float, float], epsilon: float) -> AdamStep:
        """The step ``count``, from 1 on, with a learning rate."""
        first, second = betas
        return cls(lr / (1 - first**count), 1 - first, second, 1 - second, epsilon, math.sqrt(1 - second**count))


class RoundingLayer(ctypes.Structure):
    """A layer whose rounding is learned, its tensors by their addresses.

    ``alpha``, ``grid``, ``weight``, ``grad`` and ``out`` have ``rows x columns`` elements in the same order, all
    float32 but the grid, of int16: twice the lower integer of a weight, plus 1 where the upper one is another.
    ``scale`` and ``gain`` have one element, and a step of 0, or one for each row, and a step of 1. ``weight`` is
    written from ``alpha``; ``out``, the gradient of ``alpha``, and ``gain_grad``, with an element for each row, from
    ``grad``, that of the weight. With the moments of Adam, ``mean`` and ``square``, ``alpha`` takes a step in the place
    of ``out``.
    """

    _fields_ = [
        ('rows', _COUNT), ('columns', _COUNT), ('alpha', _TENSOR), ('grid', _TENSOR), ('scale', _TENSOR),
        ('scale_step', _COUNT), ('gain', _TENSOR), ('gain_step', _COUNT), ('weight', _TENSOR), ('grad', _TENSOR),
        ('out', _TENSOR), ('mean', _TENSOR), ('square', _TENSOR), ('gain_grad', _TENSOR),
    ]  # fmt: skip


class Variable(ctypes.Structure):
    """What Adam moves, its tensors by their addresses: float32, all in the same order; ``grad`` may be None."""

    _fields_ = [('count', _COUNT), ('value', _TENSOR), ('grad', _TENSOR), ('mean', _TENSOR), ('square', _TENSOR)]


class Kernels:
    """The functions of ``kernels.c``. Tensors are float32 on the CPU and lie densely, all in the same order.

    Args:
        library: The compiled source.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._soft = library.soft_weights
        self._soft.argtypes = [_COUNT, ctypes.POINTER(RoundingLayer), Curve]
        self._rounding = library.rounding_gradients
        self._rounding.argtypes = [_COUNT, ctypes.POINTER(RoundingLayer), Curve, _NUMBER, _NUMBER, AdamStep]
        self._quantize = library.fake_quantize
        self._quantize.argtypes = [_COUNT] + [_TENSOR] * 3 + [_NUMBER] * 5
        self._gradient = library.fake_quantize_gradient
        self._gradient.argtypes = [_COUNT] + [_TENSOR] * 6 + [_NUMBER] * 4
        self._gradient.restype = ctypes.c_double
        self._mix = library.mix
        self._mix.argtypes = [_COUNT] + [_TENSOR] * 3
        self._adam = library.adam
        self._adam.argtypes = [_COUNT, ctypes.POINTER(Variable), AdamStep]

    def soft_weights(self, layers: ctypes.Array[RoundingLayer], curve: Curve) -> None:
        """Computes the soft-quantized weights of layers from their ``alpha``.

        Args:
            layers: Of all of them, one table.
            curve: Of the rectified sigmoid.
        """
        self._soft(len(layers), layers, curve)

    def rounding_gradients(
        self,
        layers: ctypes.Array[RoundingLayer],
        curve: Curve,
        power: float = 0.0,
        factor: float = 0.0,
        step: AdamStep | None = None,
    ) -> None:
        """Computes the gradients of ``alpha`` and of the gains from those of the weights; ``alpha`` may take its step.

        The regulariser adds ``factor * c * c ** (2 * power)`` with ``c = sigma - curve.half`` to that of ``sigma``.

        Args:
            layers: A ctypes array.
            curve: Of the rectified sigmoid.
            power: Half of the exponent.
            factor: 0 for no regulariser.
            step: That ``alpha`` takes, where the layers have moments.
        """
        self._rounding(len(layers), layers, curve, power, factor, step or AdamStep())

    def fake_quantize(
        self,
        x: Tensor,
        keep: int | None,
        scale: float,
        low: float,
        high: float,
        rectifier: tuple[float, float] = UNBOUNDED,
    ) -> Tensor:
        """``clamp(round(y / scale), low, high) * scale`` of ``y = clamp(x, *rectifier)``.

        Args:
            x (Tensor): Any shape.
            keep: Address of as many bytes; ``y`` itself is returned where they are 0.
            scale: Of the grid.
            low: Smallest code.
            high: Largest code.
            rectifier: Smallest and largest ``y``.
        """
        out = torch.empty_like(x)
        self._quantize(
            x.numel(), x.data_ptr(), keep, out.data_ptr(), scale, low, high, *rectifier
        )  # fmt: skip
        return out

    def fake_quantize_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        out: Tensor,
        keep: int | None,
        low: float,
        high: float,
        rectifier: tuple[float, float] = UNBOUNDED,
    ) -> tuple[Tensor, float]:
        """Returns ``grad_x`` and ``<grad, out> - <grad_y, y>`` of ``y = clamp(x, *rectifier)``.

        ``grad_y`` is ``grad`` where ``low < y < high`` or ``keep`` is 0, and ``grad_x`` is ``grad_y`` where ``x`` lies
        within the rectifier; both are else 0.
        """
        grad_x, count = torch.empty_like(x), x.numel()
        sums = torch.empty(-(-count // BLOCK), dtype=torch.float64)
        total = self._gradient(
            count, grad.data_ptr(), x.data_ptr(), out.data_ptr(), keep, grad_x.data_ptr(), sums.data_ptr(),
            low, high, *rectifier,
        )  # fmt: skip
        return grad_x, total

    def mix_(self, x: Tensor, other: Tensor, keep: int) -> None:
        """Puts ``other`` in the place of ``x`` wherever the bytes at ``keep`` are 0; both of the same shape."""
        self._mix(x.numel(), x.data_ptr(), other.data_ptr(), keep)

    def adam(self, variables: ctypes.Array[Variable], step: AdamStep) -> None:
        """A step of Adam for all variables that have a gradient.

        Args:
            variables: One table.
            step: How far.
        """
        self._adam(len(variables), variables, step)


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The compiled kernels, None where there are none; a failure to compile them is logged, once."""
    if os.environ.get(SWITCH) == '0':
        return None
    compiler = shutil.which(os.environ.get('CC') or 'cc')
    if compiler is None:
        _log_failure('there is no C compiler')
        return None
    # not kept: a file compiled for this processor may not run on another that shares the folder
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / 'kernels.so'
        try:
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), '-o', str(library), '-lm'], check=True, capture_output=True, timeout=60
            )
            return Kernels(ctypes.CDLL(str(library)))
        except (OSError, subprocess.SubprocessError) as error:
            told = (getattr(error, 'stderr', None) or b'').decode(errors='replace').strip().splitlines()
            _log_failure(f'{compiler} fails: {told[0] if told else first_line(error)}')
            return None


def kernel_state() -> str:
    """``'compiled'`` or ``'none'``: with compiled kernels the last bits of results are others."""
    return 'none' if kernels() is None else 'compiled'


def _log_failure(reason: str) -> None:
    print_log(f"kernels are not compiled, torch's operations do their work: {reason}", 'current', logging.WARNING)


def takes(first: Tensor, *others: Tensor) -> bool:
    """Whether kernels may run on tensors of the same shape: float32 on the CPU, dense, all in the same order."""
    # asked several times in every step
    if not first.is_cpu or first.dtype is not torch.float32 or not _is_dense(first):
        return False
    for other in others:
        if not other.is_cpu or other.dtype is not torch.float32:
            return False
        if other.shape != first.shape or other.stride() != first.stride():
            return False
    return True


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
