"""Functions of torch whose own form in a file is wrong, or that have none, by others."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor


def spaced(start: Any, end: Any, steps: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """Returns what ``torch.linspace`` does; its own form in a file divides by zero for a single step."""
    number = torch.arange(steps, dtype=dtype, device=device)
    return number / number[-1:].clamp(min=1) * (end - start) + start


def unfold(input: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Returns the windows along an axis that the method of torch does, by an index; a file has no form for it."""
    dim %= input.dim()
    count = (input.shape[dim] - size) // step + 1
    index = torch.arange(count, device=input.device)[:, None] * step + torch.arange(size, device=input.device)
    windows = input.index_select(dim, index.flatten())
    return windows.reshape(*input.shape[:dim], count, size, *input.shape[dim + 1 :]).movedim(dim + 1, -1)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Returns what the function of torch does; its own form in a file has a branch."""
    channels = input.shape[1]
    squares = F.pad(input.square(), [0, 0] * (input.dim() - 2) + [size // 2, (size - 1) // 2])
    power = sum((squares[:, i : i + channels] for i in range(1, size)), squares[:, :channels])
    return input / (power * (alpha / size) + k) ** beta


def computing_in_torch() -> AbstractContextManager[object]:
    """Makes mmcv's deformable attention compute as on a CPU, by functions of torch; no file has its kernel of a GPU."""
    module, name = sys.modules.get('mmcv.ops.multi_scale_deform_attn'), 'IS_CUDA_AVAILABLE'
    return patch.object(module, name, False) if hasattr(module, name) else nullcontext()
