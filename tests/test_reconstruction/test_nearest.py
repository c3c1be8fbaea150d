"""Corrected biases against the float network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.pipeline import calibrate, prepare
from mmbrecq.quantizers import BRECQQuantizer
from mmbrecq.reconstruction import NearestReconstructor
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.stages import Task


class _Tokens(nn.Module):
    """Two linear layers over 64 tokens, of which the first is far from the others and may alone be read."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.fc, self.last = first, nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, :1] * 0.01 - 1, tokens[:, 1:] + 3], 1)
        y = torch.tanh(self.fc(tokens) * 0.3)
        return self.last(y[:, 0] if self.first else y.mean(1))


def _outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize('first', [False, True], ids=['mean of tokens', 'first token'])
def test_biases_are_corrected_where_the_outputs_come_nearer_to_float(first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Tokens(first), torch.randn(16, 3, 8, 8)
    wanted = _outputs(model, x)
    options = {'bits': 3, 'rounding': {'type': 'NearestRounding'}}
    prepared = prepare(model, x, BRECQQuantizer(options, None, first_last_8bit=False))
    task = Task(prepared, x, list, None, 0, tmp_path)
    calibrate(task)

    def error() -> float:
        with prepared.quantization(weights=True, activations=False):
            return float((_outputs(prepared, x) - wanted).square().sum() / wanted.square().sum())

    plain, reconstructor = error(), NearestReconstructor()
    assert list(reconstructor.passes(task, reconstructor.plan(task), Callback())) == []
    offsets = [correction.offset for _, m, _ in prepared.weights() if (correction := bias_correction(m)) is not None]
    assert len(offsets) == 2 and all(bool(offset.any()) != first for offset in offsets)
    assert error() == plain if first else error() < 0.7 * plain
