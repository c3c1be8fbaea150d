from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmbrecq.errors import ConfigError, DataError, NonFiniteError
from mmbrecq.functional import affine_from_range
from mmbrecq.observers import BaseObserver, build_observer
from mmbrecq.observers.mse import power_loss
from mmbrecq.qtype import QType

TYPES = ['HistogramObserver', 'MSEObserver', 'MinMaxObserver', 'MovingAverageObserver', 'PercentileObserver']
PER_TENSOR = QType(8, symmetric=False, signed=False)
PER_CHANNEL = QType(4, ch_axis=0)


def observed(cfg: dict[str, Any], qtype: QType, *batches: Tensor) -> BaseObserver:
    observer = build_observer(cfg, qtype)
    for batch in batches:
        observer.observe(batch)
    return observer


def batches(count: int = 5) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 3, 8, 8) * (1 + i) + 0.2 for i in range(count)]


def assert_same(first: BaseObserver, second: BaseObserver) -> None:
    for a, b in zip(first.compute(), second.compute(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('name', TYPES)
@pytest.mark.parametrize('bits', [2, 8])
@pytest.mark.parametrize('symmetric', [True, False])
def test_per_tensor_results_are_usable(name: str, bits: int, symmetric: bool) -> None:
    for signed in (True, False):
        qtype = QType(bits, symmetric=symmetric, signed=signed)
        for data in (batches(), [b.relu() for b in batches()], [-b.relu() for b in batches()], [torch.zeros(7)] * 2):
            scale, zero_point = observed({'type': name}, qtype, *data).compute()
            assert scale.shape == zero_point.shape == ()
            assert torch.isfinite(scale) and scale > 0
            assert qtype.quant_min <= zero_point <= qtype.quant_max and zero_point == zero_point.round()
            if symmetric:
                assert zero_point == 0


@pytest.mark.parametrize('name', [t for t in TYPES if t != 'HistogramObserver'])
@pytest.mark.parametrize('axis', [0, 1, -1])
def test_channels_equal_separate_tensors(name: str, axis: int) -> None:
    x = batches(1)[0]
    scale, zero_point = observed({'type': name}, QType(4, ch_axis=axis), x).compute()
    assert scale.shape == zero_point.shape == (x.shape[axis],)
    for i in range(x.shape[axis]):
        alone, _ = observed({'type': name}, QType(4), x.select(axis, i)).compute()
        torch.testing.assert_close(scale[i], alone)


@pytest.mark.parametrize('name', [t for t in TYPES if t != 'MovingAverageObserver'])
def test_merging_shards_gives_the_scale_of_one_run(name: str) -> None:
    data = batches()
    whole = observed({'type': name}, PER_TENSOR, *data)
    first, second = observed({'type': name}, PER_TENSOR, *data[3:]), observed({'type': name}, PER_TENSOR, *data[:3])
    first.merge(second)
    assert first.batches == 5
    assert_same(first, whole)
    assert_same(observed({'type': name}, PER_TENSOR, *reversed(data)), whole)


@pytest.mark.parametrize('name', TYPES)
def test_merging_with_an_empty_one_survives_further_batches(name: str) -> None:
    data = batches(2)
    observer = observed({'type': name}, PER_TENSOR, data[0])
    before = copy.deepcopy(observer)
    before.merge(build_observer({'type': name}, PER_TENSOR))
    empty = build_observer({'type': name}, PER_TENSOR)
    empty.merge(observer)
    observer.observe(data[1] * 10)
    assert_same(empty, before)
    assert_same(empty, observed({'type': name}, PER_TENSOR, data[0]))


@pytest.mark.parametrize('name', TYPES)
def test_a_parameter_is_observed_without_its_graph(name: str) -> None:
    x = torch.nn.Parameter(batches(1)[0])
    assert not observed({'type': name}, PER_TENSOR, x).compute()[0].requires_grad


@pytest.mark.parametrize('name', TYPES)
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(name: str, bad: float) -> None:
    data = batches(1)[0]
    observer = observed({'type': name}, PER_TENSOR, data)
    broken = data.clone()
    broken[1, 2, 3, 4] = broken[0, 0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match=r'expected finite values, but got 2 NaN or infinite ones among 768'):
        observer.observe(broken)
    assert observer.batches == 1
    assert_same(observer, observed({'type': name}, PER_TENSOR, data))


@pytest.mark.parametrize('name', TYPES)
def test_empty_batches_and_half_precision(name: str) -> None:
    observer = observed({'type': name}, PER_TENSOR, torch.empty(0, 3))
    assert observer.batches == 0
    data = batches(1)[0].half()
    observer.observe(data)
    assert_same(observer, observed({'type': name}, PER_TENSOR, data.float()))
    assert observer.compute()[0].dtype == torch.float32


@pytest.mark.parametrize('name', TYPES)
def test_observed_tensors_may_change_afterwards(name: str) -> None:
    data = batches(1)[0]
    observer = observed({'type': name}, PER_TENSOR, scratch := data.clone())
    scratch.zero_()
    assert_same(observer, observed({'type': name}, PER_TENSOR, data))


def test_min_max_covers_all_batches() -> None:
    data = batches()
    values = torch.cat([b.movedim(1, 0).flatten(1) for b in data], dim=1).numpy()
    scale, zero_point = observed({'type': 'MinMaxObserver'}, QType(8, False, False, 1), *data).compute()
    expected = (values.max(axis=1) - values.min(axis=1)) / 255
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(zero_point.numpy(), np.round(-values.min(axis=1) / expected))


def test_moving_average_equals_the_recursion() -> None:
    data = batches()
    low, high = float(data[0].min()), float(data[0].max())
    for batch in data[1:]:
        low, high = 0.7 * low + 0.3 * float(batch.min()), 0.7 * high + 0.3 * float(batch.max())
    observer = observed({'type': 'MovingAverageObserver', 'momentum': 0.7}, PER_TENSOR, *data)
    assert observer.compute()[0].item() == pytest.approx((high - low) / 255)


def test_merged_moving_averages_are_those_of_one_run() -> None:
    data = batches(5)
    cfg = {'type': 'MovingAverageObserver'}
    whole = observed(cfg, PER_TENSOR, *data)
    first, second = observed(cfg, PER_TENSOR, *data[:2]), observed(cfg, PER_TENSOR, *data[2:])
    first.merge(second)
    assert first.batches == 5
    assert_same(first, whole)


def part_of(cfg: dict[str, Any], first: int, *data: Tensor) -> BaseObserver:
    """What a process has observed whose first batch is the ``first`` of all."""
    observer = observed(cfg, PER_TENSOR, *data)
    observer.first = first
    return observer


@pytest.mark.parametrize('name', TYPES)
@pytest.mark.parametrize('cut', [1, 3])
def test_a_batch_on_the_border_of_two_shares_is_one_batch(name: str, cut: int) -> None:
    data = batches(3)
    whole = observed({'type': name}, PER_TENSOR, *data)
    left, right = part_of({'type': name}, 0, data[0], data[1][:cut]), part_of({'type': name}, 1, data[1][cut:], data[2])
    left.merge(right)
    assert (left.first, left.batches) == (0, 3)
    assert_same(left, whole)


@pytest.mark.parametrize('name', TYPES)
def test_two_parts_of_a_single_batch_give_its_scale(name: str) -> None:
    (batch,) = batches(1)
    left, right = part_of({'type': name}, 0, batch[:1]), part_of({'type': name}, 0, batch[1:])
    left.merge(right)
    assert left.batches == 1
    assert_same(left, observed({'type': name}, PER_TENSOR, batch))


def test_moving_averages_of_batches_that_lie_apart_are_refused() -> None:
    cfg = {'type': 'MovingAverageObserver'}
    data = batches(2)
    with pytest.raises(ConfigError, match='expected batches from 0 to 1 on to merge, but got 2'):
        part_of(cfg, 0, data[0]).merge(part_of(cfg, 2, data[1]))


@pytest.mark.parametrize('percentile', [90, 99.9, 100])
def test_percentile_of_one_batch_equals_numpy(percentile: float) -> None:
    x = batches(1)[0]
    cfg = {'type': 'PercentileObserver', 'percentile': percentile}
    scale, _ = observed(cfg, QType(8, False, False, 0), x).compute()
    rows = x.flatten(1).numpy()
    low, high = np.percentile(rows, 100 - percentile, axis=1), np.percentile(rows, percentile, axis=1)
    np.testing.assert_allclose(scale.numpy(), (high - low) / 255, rtol=1e-5)


def test_percentile_of_many_batches_is_near_numpy() -> None:
    torch.manual_seed(0)
    data = [torch.randn(20000) for _ in range(5)]
    scale, _ = observed({'type': 'PercentileObserver', 'percentile': 99.0}, PER_TENSOR, *data).compute()
    low, high = np.percentile(torch.cat(data).numpy(), [1, 99])
    assert scale.item() == pytest.approx((high - low) / 255, rel=2e-3)


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('qtype', [QType(4), QType(4, signed=False), QType(4, symmetric=False, signed=False)])
def test_mse_on_the_histogram_is_as_good_as_on_the_values(bits: int, qtype: QType) -> None:
    qtype = QType(bits, qtype.symmetric, qtype.signed)
    torch.manual_seed(0)
    data = [torch.randn(10000) if qtype.signed else torch.randn(10000).relu() * 6 for _ in range(4)]
    rows = torch.cat(data)[None]

    def loss(observer: BaseObserver) -> float:
        scale, zero_point = observer.compute()
        return float(power_loss(rows, scale[None], zero_point[None], qtype, 2.4))

    streamed = loss(observed({'type': 'MSEObserver'}, qtype, *data))
    assert streamed <= loss(observed({'type': 'MSEObserver'}, qtype, rows)) * 1.005


def test_mse_is_no_worse_than_min_max() -> None:
    x = batches(1)[0]
    rows = x.flatten(1)
    found = [observed({'type': t}, PER_CHANNEL, x).compute() for t in ('MSEObserver', 'MinMaxObserver')]
    mse, minmax = (power_loss(rows, s, z, PER_CHANNEL, 2.4) for s, z in found)
    assert (mse < minmax).all()


def test_mse_keeps_large_batches_as_a_histogram_only() -> None:
    observer = build_observer({'type': 'MSEObserver'}, QType(4))
    observer.MAX_KEPT = 100  # type: ignore[attr-defined]
    observer.observe(torch.randn(101))
    assert observer.values is None  # type: ignore[attr-defined]
    assert observer.compute()[0] > 0


def test_histogram_observer_ignores_the_spike_of_relu() -> None:
    torch.manual_seed(0)
    x = torch.randn(50000).abs()
    qtype = QType(8, signed=False)
    observer = observed({'type': 'HistogramObserver'}, qtype, x)
    assert observer.values is None  # type: ignore[attr-defined]
    scale, _ = observer.compute()
    spiked, _ = observed({'type': 'HistogramObserver'}, qtype, torch.cat([x, torch.zeros(500000)])).compute()
    assert spiked.item() == pytest.approx(scale.item(), rel=0.02)
    assert scale <= affine_from_range(x.min(), x.max(), qtype)[0]


@pytest.mark.parametrize('name', ['MSEObserver', 'PercentileObserver'])
def test_single_batches_merge_into_two(name: str) -> None:
    first, second = (observed({'type': name}, PER_TENSOR, b) for b in batches(2))
    first.merge(second)
    assert_same(first, observed({'type': name}, PER_TENSOR, *batches(2)))


@pytest.mark.parametrize('name', ['MSEObserver', 'PercentileObserver'])
def test_second_batch_per_channel_is_refused(name: str) -> None:
    x = batches(1)[0]
    observer = observed({'type': name}, PER_CHANNEL, x)
    with pytest.raises(ConfigError, match=f'expected a single batch for {name} with one scale per channel'):
        observer.observe(x)
    with pytest.raises(ConfigError, match='expected a single batch'):
        observer.merge(observed({'type': name}, PER_CHANNEL, x))


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        ({'type': 'MeanObserver'}, 'unknown observer type .MeanObserver.: expected one of ' + ', '.join(TYPES)),
        ({'type': 'MSEObserver', 'q': 2}, 'unknown option .q. of MSEObserver: expected p or steps or bins'),
        ({'type': 'MSEObserver', 'p': 0}, r'expected p of MSEObserver to be a number in \(0, inf\), but got 0'),
        ({'type': 'MSEObserver', 'steps': 0}, 'expected steps of MSEObserver .* but got 0'),
        ({'type': 'MSEObserver', 'bins': 100}, 'expected bins to be an integer >= 2048, but got 100'),
        ({'type': 'HistogramObserver', 'steps': 1.5}, 'expected steps of HistogramObserver .* but got 1.5'),
        ({'type': 'PercentileObserver', 'percentile': 50}, r'percentile of PercentileObserver .* in \(50, 100\]'),
        ({'type': 'MovingAverageObserver', 'momentum': 1}, r'momentum of MovingAverageObserver .* in \[0, 1\)'),
    ],
)
def test_invalid_options_are_refused(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_observer(cfg, PER_TENSOR)


@pytest.mark.parametrize('name', TYPES)
def test_an_observer_that_has_seen_nothing_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f'expected {name} to have observed values, but it has seen none'):
        build_observer({'type': name}, PER_TENSOR).compute()


def test_histogram_observer_refuses_channels() -> None:
    with pytest.raises(ConfigError, match='expected one scale per tensor, ch_axis None, for .*, but got 0'):
        build_observer({'type': 'HistogramObserver'}, PER_CHANNEL)


def test_shapes_that_do_not_fit_are_refused() -> None:
    observer = build_observer({'type': 'MinMaxObserver'}, QType(8, ch_axis=2))
    with pytest.raises(ConfigError, match='expected ch_axis 2 to be an axis of the tensor, but got 1 axes'):
        observer.observe(torch.randn(3))
    observer.observe(torch.randn(1, 1, 4))
    with pytest.raises(ConfigError, match='expected 4 channels as before, but got 5'):
        observer.observe(torch.randn(1, 1, 5))
