"""The arithmetic of a training step in compiled form, where there is a C compiler.

A chain of torch's operations reads and writes each tensor a dozen times, which for large weights and small images
takes longer than the convolutions. Compiling takes a quarter of a second, when the first kernel is wanted. Without a
compiler, on other devices and for other dtypes torch's operations do the same.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name('kernels.c')
FLAGS = ('-O3', '-march=native', '-fopenmp', '-fno-math-errno', '-fno-trapping-math', '-shared', '-fPIC')
SWITCH = 'MMBRECQ_KERNELS'
"""Environment variable: 0 for torch's operations alone."""
BLOCK = 4096
"""Elements of a partial sum; that of the source."""

_COUNT, _TENSOR, _NUMBER = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Kernels:
    """The functions of ``kernels.c``. Tensors are float32 on the CPU and lie densely, all in the same order.

    Args:
        library: The compiled source.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._soft = library.soft_weight
        self._soft.argtypes = [_COUNT] * 2 + [_TENSOR] * 4 + [_COUNT] + [_TENSOR] * 2 + [_NUMBER] * 2
        self._rounding = library.rounding_gradient
        self._rounding.argtypes = [_COUNT] * 2 + [_TENSOR] * 5 + [_COUNT] + [_TENSOR] * 2 + [_NUMBER] * 5
        self._quantize = library.fake_quantize
        self._quantize.argtypes = [_COUNT] + [_TENSOR] * 3 + [_NUMBER] * 3
        self._gradient = library.fake_quantize_gradient
        self._gradient.argtypes = [_COUNT] + [_TENSOR] * 6 + [_NUMBER] * 2
        self._gradient.restype = ctypes.c_double

    def soft_weight(
        self,
        sigma: Tensor,
        weight: Tensor,
        alpha: Tensor,
        base: Tensor,
        stride: Tensor,
        gain: Tensor,
        bounds: tuple[float, float],
    ) -> None:
        """``sigma = clamp(sigmoid(alpha), *bounds)`` and ``weight = (base + stride * sigma) * gain``.

        Args:
            sigma (Tensor): ``(C, ...)``, written.
            weight (Tensor): Same shape, written.
            alpha (Tensor): Same shape.
            base (Tensor): Same shape.
            stride (Tensor): Same shape.
            gain (Tensor): One element, or ``C``.
            bounds: Smallest and largest ``sigma``.
        """
        rows = alpha.shape[0]
        self._soft(
            rows, alpha.numel() // rows, alpha.data_ptr(), base.data_ptr(), stride.data_ptr(), gain.data_ptr(),
            int(gain.numel() > 1), sigma.data_ptr(), weight.data_ptr(), *bounds,
        )  # fmt: skip

    def rounding_gradient(
        self,
        out: Tensor,
        grad: Tensor,
        weight: Tensor,
        stride: Tensor,
        sigma: Tensor,
        gain: Tensor,
        bounds: tuple[float, float, float],
        power: float,
        factor: float,
    ) -> Tensor:
        """Writes the gradient of ``alpha``; returns that of the gain, ``(C,)``.

        The regulariser adds ``factor * c * c ** (2 * power)`` with ``c = sigma - half`` to the gradient of ``sigma``.

        Args:
            out (Tensor): ``(C, ...)``, written.
            grad (Tensor): Gradient of ``weight``, same shape.
            weight (Tensor): Same shape.
            stride (Tensor): Same shape.
            sigma (Tensor): Same shape.
            gain (Tensor): One element, or ``C``.
            bounds: Of ``sigma``, with its value at half way between them.
            power: Half of the exponent.
            factor: 0 for no regulariser.
        """
        rows = out.shape[0]
        gain_grad = torch.empty(rows)
        self._rounding(
            rows, out.numel() // rows, grad.data_ptr(), weight.data_ptr(), stride.data_ptr(), sigma.data_ptr(),
            gain.data_ptr(), int(gain.numel() > 1), out.data_ptr(), gain_grad.data_ptr(), *bounds, power, factor,
        )  # fmt: skip
        return gain_grad

    def fake_quantize(self, x: Tensor, keep: Tensor | None, scale: float, low: float, high: float) -> Tensor:
        """``clamp(round(x / scale), low, high) * scale``, and ``x`` itself where ``keep`` is 0."""
        out = torch.empty_like(x)
        self._quantize(
            x.numel(), x.data_ptr(), None if keep is None else keep.data_ptr(), out.data_ptr(), scale, low, high
        )
        return out

    def fake_quantize_gradient(
        self, grad: Tensor, x: Tensor, out: Tensor, keep: Tensor | None, low: float, high: float
    ) -> tuple[Tensor, float]:
        """Returns ``grad_x`` and ``<grad, out> - <grad_x, x>``.

        ``grad_x`` is ``grad`` where ``low < x < high`` or ``keep`` is 0, and else 0.
        """
        grad_x, count = torch.empty_like(x), x.numel()
        sums = torch.empty(-(-count // BLOCK), dtype=torch.float64)
        total = self._gradient(
            count, grad.data_ptr(), x.data_ptr(), out.data_ptr(), None if keep is None else keep.data_ptr(),
            grad_x.data_ptr(), sums.data_ptr(), low, high,
        )  # fmt: skip
        return grad_x, total


@lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The compiled kernels, None where there are none."""
    compiler = shutil.which(os.environ.get('CC') or 'cc')
    if compiler is None or os.environ.get(SWITCH) == '0':
        return None
    # not kept: a file compiled for this processor may not run on another that shares the folder
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / 'kernels.so'
        try:
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), '-o', str(library), '-lm'], check=True, capture_output=True, timeout=60
            )
            return Kernels(ctypes.CDLL(str(library)))
        except (OSError, subprocess.SubprocessError):
            return None


def takes(*tensors: Tensor) -> bool:
    """Whether kernels may run on tensors of the same shape: float32 on the CPU, dense, all in the same order."""
    first = tensors[0]
    if not _is_dense(first):
        return False
    return all(
        t.device.type == 'cpu' and t.dtype == torch.float32 and t.shape == first.shape and t.stride() == first.stride()
        for t in tensors
    )


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
