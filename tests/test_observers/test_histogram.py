from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from mmbrecq.errors import ConfigError
from mmbrecq.observers.histogram import StreamingHistogram


def filled(*batches: Tensor, bins: int = 2048) -> StreamingHistogram:
    histogram = StreamingHistogram(bins)
    for batch in batches:
        histogram.add(batch, float(batch.min()), float(batch.max()))
    return histogram


def same(a: StreamingHistogram, b: StreamingHistogram) -> bool:
    numbers = all(getattr(a, name) == getattr(b, name) for name in ('low', 'high', 'exponent', 'start'))
    return numbers and torch.equal(a.counts, b.counts)


def growing(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(3, 50) * factor + shift for factor, shift in [(1e-3, 0), (5, 0), (0.1, 70), (40, -9), (1, 1)]]


def test_counts_equal_numpy() -> None:
    batches = growing()
    histogram = filled(*batches)
    edges = (histogram.start + np.arange(histogram.bins + 1)) * histogram.width
    values = torch.cat([b.reshape(-1) for b in batches]).numpy()
    expected = np.bincount(np.searchsorted(edges, values, side='right') - 1, minlength=histogram.bins)
    np.testing.assert_array_equal(histogram.counts.numpy(), expected)
    assert int(histogram.counts.sum()) == values.size


@pytest.mark.parametrize('seed', range(5))
def test_order_and_sharding_do_not_matter(seed: int) -> None:
    batches = growing(seed)
    once = filled(torch.cat([b.reshape(-1) for b in batches]))
    assert same(filled(*batches), once)
    assert same(filled(*reversed(batches)), once)
    left, right = filled(*batches[:2]), filled(*batches[2:])
    right.merge(left)
    assert same(right, once)


@pytest.mark.parametrize('values', [[0.0], [5.0], [-5.0], [1e-38], [3e38, -3e38], [0.0, 2048.0], [-1.0, 0.0]])
def test_every_value_finds_its_bin(values: list[float]) -> None:
    histogram = filled(torch.tensor(values))
    assert int(histogram.counts.sum()) == len(values)
    used = int(max(histogram.high, 0) / histogram.width) - histogram.start + 1
    assert used <= histogram.bins
    assert values in ([0.0], [1e-38]) or used >= histogram.bins // 2
    centers = histogram.centers()[histogram.counts > 0]
    assert (centers - torch.tensor(sorted(values))).abs().max() <= histogram.width


def test_merge_with_an_empty_one_changes_nothing() -> None:
    histogram, empty = filled(*growing()), StreamingHistogram(2048)
    before = copy.deepcopy(histogram)
    histogram.merge(empty)
    assert same(histogram, before)
    empty.merge(histogram)
    assert same(empty, histogram)


@pytest.mark.parametrize('bins', [100, 2047, 4096.0, 'many'])
def test_bins_are_checked(bins: object) -> None:
    with pytest.raises(ConfigError, match='expected bins to be an integer >= 2048'):
        StreamingHistogram(bins)  # type: ignore[arg-type]


@pytest.mark.parametrize('q', [0, 0.01, 1, 30, 50, 77.7, 99, 99.99, 100])
def test_percentile_equals_numpy_to_a_bin(q: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(20000) * 3 + 1
    histogram = filled(*x.split(999))
    # Where values are sparser than bins, the neighbours in rank bound the answer.
    ordered, rank = np.sort(x.numpy()), q / 100 * (x.numel() - 1)
    bottom, top = ordered[int(np.floor(rank))], ordered[int(np.ceil(rank))]
    assert bottom - histogram.width <= histogram.percentile(q) <= top + histogram.width


def test_half_precision_and_other_shapes_are_counted_whole() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert int(filled(x.double()).counts.sum()) == int(filled(x.transpose(0, 3)).counts.sum()) == 120
