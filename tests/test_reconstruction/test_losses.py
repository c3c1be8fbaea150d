from __future__ import annotations

import numpy as np
import pytest
import torch

from mmbrecq.reconstruction import FisherLoss, MSELoss
from mmbrecq.registry import LOSSES

SHAPES = pytest.mark.parametrize('shape', [(4, 3, 5, 2), (4, 3), (4, 3, 7)], ids=['map', 'vector', 'tokens'])


def arrays(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    fisher = rng.exponential(1, shape)
    return rng.normal(size=shape), rng.normal(size=shape), fisher / fisher.mean()


def test_both_are_registered() -> None:
    assert LOSSES.get('MSELoss') is MSELoss
    assert LOSSES.get('FisherLoss') is FisherLoss
    assert not MSELoss.needs_fisher
    assert FisherLoss.needs_fisher


@SHAPES
def test_mse_sums_channels_and_averages_the_rest(shape: tuple[int, ...]) -> None:
    output, target, _ = arrays(shape)
    expected = ((output - target) ** 2).sum() / (np.prod(shape) / shape[1])
    got = MSELoss()(torch.from_numpy(output), torch.from_numpy(target))
    assert got.shape == ()
    assert float(got) == pytest.approx(expected, rel=1e-12)


@SHAPES
@pytest.mark.parametrize('floor', [0.0, 0.3])
def test_fisher_weighs_every_element(shape: tuple[int, ...], floor: float) -> None:
    output, target, fisher = arrays(shape)
    weight = floor + (1 - floor) * fisher
    expected = (weight * (output - target) ** 2).sum() / (np.prod(shape) / shape[1])
    got = FisherLoss(floor=floor)(*(torch.from_numpy(a) for a in (output, target, fisher)))
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_weights_of_one_are_plain_mse() -> None:
    output, target, _ = (torch.from_numpy(a) for a in arrays((4, 3, 5, 2)))
    same = FisherLoss()(output, target, torch.ones_like(output))
    assert float(same) == pytest.approx(float(MSELoss()(output, target)), rel=1e-12)


def test_gradient_of_the_output() -> None:
    output, target, fisher = (torch.from_numpy(a) for a in arrays((4, 3, 5, 2)))
    output.requires_grad_(True)
    FisherLoss()(output, target, fisher).backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, 2 * fisher * (output - target).detach() / (4 * 5 * 2))
