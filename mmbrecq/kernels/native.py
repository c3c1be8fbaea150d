"""The arithmetic of an iteration in compiled form, where there is a C compiler.

A chain of torch's operations reads and writes each tensor a dozen times, which for large weights and small images
takes longer than the convolutions. Compiling takes a third of a second, when the first kernel is wanted. Without a
compiler, on other devices and for other dtypes torch's operations do the same: :func:`kernel` decides which of the two.
"""

import ctypes
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmbrecq.errors import first_line

SOURCE = Path(__file__).with_name('kernels.c')
FLAGS = ('-O3', '-march=native', '-fopenmp', '-fno-math-errno', '-fno-trapping-math', '-shared', '-fPIC', '-lm')
SWITCH = 'MMBRECQ_KERNELS'
"""Environment variable: with 0, torch's operations do all work."""
BLOCK = 4096
"""Elements of a partial sum, as in the source."""

_COUNT, _NUMBER = ctypes.c_int64, ctypes.c_float


class Array(ctypes.Structure):
    """Tells a kernel where a tensor lies, see :func:`as_array`."""

    _fields_ = [('count', _COUNT), ('data', ctypes.c_void_p)]


class Curve(ctypes.Structure):
    """A rectified sigmoid ``h = sigma * stretch + gamma``, and the ``sigma`` where it is 0, 1/2 and 1."""

    _fields_ = [(name, _NUMBER) for name in ('gamma', 'stretch', 'low', 'half', 'high')]


class Variable(ctypes.Structure):
    """A variable of Adam, its gradient, which may be missing, its moments, and its rate over the mean's correction."""

    _fields_ = [*((name, Array) for name in ('value', 'grad', 'mean', 'square')), ('rate', _NUMBER)]


_DTYPES = (torch.float32, torch.float64, torch.int16, torch.uint8)
_F32, _F64, _I16, _U8 = _DTYPES
OPERATIONS: dict[str, tuple[Any, ...]] = {
    # x, keep, out; scale, low, high, floor, ceiling
    'fake_quantize': (_F32, _U8, _F32, *[_NUMBER] * 5),
    # grad, x, out, keep, grad_x, sums; low, high, floor, ceiling
    'fake_quantize_gradient': (_F32, _F32, _F32, _U8, _F32, _F64, *[_NUMBER] * 4),
    # x, other, keep
    'mix': (_F32, _F32, _U8),
    # rows; alpha, grid, scale, gain, weight; curve
    'soft_weight': (_COUNT, _F32, _I16, _F32, _F32, _F32, Curve),
    # rows; alpha, grid, scale, gain, grad, alpha_grad, gain_grad; curve, power, factor
    'rounding_gradient': (_COUNT, _F32, _I16, *[_F32] * 5, Curve, _NUMBER, _NUMBER),
    # variables; 1 - beta1, beta2, 1 - beta2, epsilon, root of the correction of the square
    'adam': (_COUNT, ctypes.POINTER(Variable), *[_NUMBER] * 5),
}
"""All operations that have a compiled form: the dtypes of their tensors, and the types of their numbers."""
DISABLED: set[str] = set()
"""Operations that torch does nevertheless, for tests and benchmarks."""

Kernel = Callable[..., None]


def kernel(operation: str, first: Tensor, *others: Tensor | None) -> Kernel | None:
    """Decides who does an operation: its compiled function, or torch, for which None is returned.

    Args:
        operation: One of :data:`OPERATIONS`.
        first (Tensor): The function is for float32 on the CPU, dense in memory.
        *others: Tensors of the same shape and order in memory, float32 but for a mask of uint8; None for no tensor.

    Returns:
        A function of numbers and tensors, in the order of ``kernels.c``; tensors are written in place, and None stands
        for an array that is not there. Of a tensor that stays where it is, :func:`as_array` saves a look at every call.
    """
    # asked several times in every iteration
    if not first.is_cpu or first.dtype is not torch.float32 or not is_dense(first) or operation in DISABLED:
        return None
    for other in others:
        if other is not None and not (other.is_cpu and other.dtype in (torch.float32, torch.uint8)):
            return None
        if other is not None and (other.shape != first.shape or other.stride() != first.stride()):
            return None
    return (kernels() or {}).get(operation)


def is_dense(x: Tensor) -> bool:
    """Returns whether a tensor lies in memory without gaps, contiguous or with its channels innermost."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


@lru_cache(maxsize=1)
def kernels() -> dict[str, Kernel] | None:
    """Returns the compiled functions by operation, None where there are none; a failure is logged, once."""
    if os.environ.get(SWITCH) == '0':
        return None
    compiler = os.environ.get('CC') or 'cc'
    # not kept: a file compiled for this processor may not run on another that shares the folder
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'kernels.so')
        try:
            subprocess.run([compiler, str(SOURCE), '-o', path, *FLAGS], check=True, capture_output=True, timeout=60)
            library = ctypes.CDLL(path)
        except (OSError, subprocess.SubprocessError) as error:
            told = (getattr(error, 'stderr', None) or b'').decode(errors='replace').strip().splitlines()
            reason = told[0] if told else first_line(error)
            text = f"kernels are not compiled, torch's operations do their work: {compiler} fails: {reason}"
            print_log(text, 'current', logging.WARNING)
            return None
    found: dict[str, Kernel] = {}
    for operation, types in OPERATIONS.items():
        function = getattr(library, operation)
        function.argtypes = [Array if kind in _DTYPES else kind for kind in types]
        found[operation] = partial(_call, function, types)
    return found


def kernel_state() -> str:
    """Returns ``'compiled'`` or ``'none'``: with compiled kernels the last bits of results are others."""
    return 'none' if kernels() is None else 'compiled'


def _call(function: Any, types: tuple[Any, ...], *arguments: Any) -> None:
    pairs = zip(arguments, types, strict=True)
    status = function(*[as_array(value, kind) if kind in _DTYPES else value for value, kind in pairs])
    assert status == 0, f'expected arrays of the same length for {function.__name__}, but got other ones'


def as_array(x: Tensor | Array | None, dtype: torch.dtype = torch.float32) -> Array:
    """Returns where the elements of a dense tensor on the CPU lie; the caller keeps the tensor alive."""
    if isinstance(x, Array):
        return x
    if x is None:
        return Array(0, None)
    assert x.is_cpu and x.dtype == dtype and is_dense(x), f'expected dense {dtype} on the CPU, but got {x.dtype}'
    return Array(x.numel(), x.data_ptr())
