"""Random masks: how many ones, where, and from which generator."""

from __future__ import annotations

import pytest
import torch

from mmbrecq.fake_quants.masks import RandomMasks, mix_


def masks(prob: float, seed: int = 3) -> RandomMasks:
    return RandomMasks(prob, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('shape', [(1,), (3, 5, 7), (100, 80)])
@pytest.mark.parametrize('prob', [0.001, 0.25, 0.8, 1.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_share_of_ones(shape: tuple[int, ...], prob: float, dtype: torch.dtype) -> None:
    like = torch.zeros(shape, dtype=dtype)
    source = masks(prob)
    drawn = torch.stack([source.draw(like) for _ in range(20)])
    assert (drawn.shape[1:], drawn.dtype) == (like.shape, torch.uint8)
    assert ((drawn == 0) | (drawn == 1)).all()
    # five standard deviations, and the rounding of the probability
    deviation = 5 * (prob * (1 - prob) / drawn.numel()) ** 0.5 + 1 / 256
    assert float(drawn.double().mean()) == pytest.approx(prob, abs=deviation)


def test_one_generator_gives_one_sequence() -> None:
    like = torch.zeros(50, 40)
    first, again, other = masks(0.5), masks(0.5), masks(0.5, seed=4)
    for _ in range(3):
        torch.rand(1)  # the global generator plays no part
        mask = first.draw(like)
        assert torch.equal(mask, again.draw(like))
        assert not torch.equal(mask, other.draw(like))


def test_masks_of_one_tensor_are_independent() -> None:
    """Over many draws every element is kept as often as any other, and no element goes with its neighbour."""
    like = torch.zeros(64, 16)
    source = masks(0.5)
    drawn = torch.stack([source.draw(like).flatten() for _ in range(2000)]).double()
    shares = drawn.mean(0)
    assert float((shares - 0.5).abs().max()) < 5 * 0.5 / 2000**0.5
    correlation = torch.corrcoef(drawn.T)
    off_diagonal = correlation[~torch.eye(len(correlation), dtype=torch.bool)]
    assert float(off_diagonal.std()) == pytest.approx(1 / 2000**0.5, rel=0.05)
    assert float(off_diagonal.abs().max()) < 7 / 2000**0.5


def test_a_larger_tensor_is_served() -> None:
    source = masks(0.5)
    source.draw(torch.zeros(10))
    large = source.draw(torch.zeros(3_000_000))
    assert large.shape == (3_000_000,)
    # the earlier mask is still whole: a backward pass may wait for it
    assert float(large.double().mean()) == pytest.approx(0.5, abs=0.002)


def test_a_mask_lies_in_memory_as_its_tensor_does() -> None:
    like = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    mask = masks(0.5).draw(like)
    assert (mask.shape, mask.stride()) == (like.shape, like.stride())
    memory = mask.permute(0, 2, 3, 1).reshape(-1)
    assert torch.equal(memory, masks(0.5).draw(torch.empty(120)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_mixing_keeps_where_the_mask_is_one(dtype: torch.dtype) -> None:
    x, other = (torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(2))
    keep = masks(0.5).draw(x)
    expected = torch.where(keep.bool(), x, other)
    mix_(x, other, keep)
    assert torch.equal(x, expected)
