from __future__ import annotations

import numpy as np
import pytest
import torch

from mmbrecq.observers.histogram import EMPTY, StreamingHistogram, fill_zero_bin, kl_divergence, kl_search
from mmbrecq.qtype import QType


def naive_divergence(counts: np.ndarray, levels: np.ndarray, inside: np.ndarray) -> float:
    """The listing of Migacz's slides, a level and a bin at a time."""
    index = np.flatnonzero(inside)
    reference = counts[index].copy()
    reference[0] += counts[: index[0]].sum()
    reference[-1] += counts[index[-1] + 1 :].sum()
    candidate = np.zeros_like(reference)
    for level in np.unique(levels[index]):
        members = [k for k, bin_ in enumerate(index) if levels[bin_] == level]
        mass = sum(counts[index[k]] for k in members)
        nonzero = [k for k in members if reference[k] > 0]
        for k in nonzero:
            candidate[k] = mass / len(nonzero)
    reference, candidate = reference / reference.sum(), candidate / candidate.sum()
    return sum(r * np.log(r / max(c, EMPTY)) for r, c in zip(reference, candidate, strict=True) if r > 0)


def naive_search(centers: np.ndarray, counts: np.ndarray, low: float, high: float, qtype: QType) -> float:
    best, scale_found = np.inf, 0.0
    for i in range(128):
        top = high * (1 - i / 128)
        bottom = -top if qtype.signed else low * (1 - i / 128)
        scale = top / qtype.quant_max
        levels = np.clip(np.round(centers / scale), qtype.quant_min, qtype.quant_max) - qtype.quant_min
        inside = (centers >= bottom) & (centers <= top)
        if scale < centers[101] - centers[100] or counts[inside].sum() == 0:
            continue
        loss = naive_divergence(counts, levels, inside)
        if loss < best:
            best, scale_found = loss, scale
    return scale_found


@pytest.mark.parametrize('seed', range(10))
def test_divergence_equals_the_naive_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 4, 60).astype(np.float64) * (random.random(60) < 0.8)
    levels = np.sort(random.integers(0, 8, 60))
    inside = np.zeros(60, dtype=bool)
    inside[random.integers(0, 10) : random.integers(40, 60)] = True
    found = kl_divergence(torch.from_numpy(counts), torch.from_numpy(levels), torch.from_numpy(inside))
    assert found.item() == pytest.approx(naive_divergence(counts, levels, inside), rel=1e-9)


def test_divergence_is_zero_when_each_bin_is_a_level_and_infinite_without_values() -> None:
    counts, levels = torch.tensor([1.0, 0, 5, 2]), torch.arange(4)
    assert kl_divergence(counts, levels, torch.ones(4, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-7)
    assert kl_divergence(counts, levels, torch.tensor([False, True, False, False])).item() == np.inf


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('signed', [True, False])
def test_search_equals_the_naive_one(bits: int, signed: bool) -> None:
    random = np.random.default_rng(0)
    x = random.laplace(size=30000) if signed else np.abs(random.laplace(size=30000))
    x = np.where(x < 0, x / 3, x)
    counts, edges = np.histogram(x, 400, range=(-np.abs(x).max() if signed else 0, np.abs(x).max()))
    centers, qtype = (edges[1:] + edges[:-1]) / 2, QType(bits, signed=signed)
    low, high = (x.min() if signed else 0.0), x.max()
    tensors = (torch.from_numpy(v) for v in (centers, counts.astype(np.float64), np.array(low), np.array(high)))
    scale, zero_point = kl_search(*tensors, float(edges[1] - edges[0]), qtype)
    assert zero_point.item() == 0
    assert scale.item() == pytest.approx(naive_search(centers, counts.astype(np.float64), low, high, qtype))
    assert scale.item() < high / qtype.quant_max


@pytest.mark.parametrize(
    ('counts', 'zero_bin', 'expected'), [([9, 2, 1], 0, 2), ([3, 9, 5], 1, 5), ([4, 9, 0], 1, 4), ([1, 2, 9], 2, 2)]
)
def test_zero_bin_takes_its_larger_neighbour(counts: list[float], zero_bin: int, expected: float) -> None:
    before = torch.tensor(counts, dtype=torch.float32)
    filled = fill_zero_bin(before, zero_bin)
    assert filled[zero_bin].item() == expected
    assert before.tolist() == counts


@pytest.mark.parametrize('value', [0.0, 2.5, -2.5])
def test_constant_values_keep_their_range(value: float) -> None:
    histogram = StreamingHistogram(2048)
    histogram.add(torch.full((10,), value), value, value)
    counts = fill_zero_bin(histogram.counts.float(), histogram.zero_bin)
    low = high = torch.tensor(value)
    scale, _ = kl_search(histogram.centers(), counts, low, high, histogram.width, QType(8))
    assert scale.item() == pytest.approx(max(abs(value) / 127, torch.finfo(torch.float32).eps))
