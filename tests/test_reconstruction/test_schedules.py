from __future__ import annotations

import doctest
import importlib
import itertools
import math

import pytest

from mmbrecq.reconstruction.schedules import constant, cosine, linear_beta


@pytest.mark.parametrize('t', [0.0, 0.1, 0.1999])
def test_no_regulariser_during_the_warm_up(t: float) -> None:
    assert linear_beta(t, 20, 2, 0.2) is None


@pytest.mark.parametrize(
    ('t', 'beta'), [(0.2, 20.0), (0.4, 15.5), (0.6, 11.0), (0.8, 6.5), (0.99, 2.225), (1.0, 2.0), (1.5, 2.0)]
)
def test_linear_from_start_to_end(t: float, beta: float) -> None:
    """20 -> 2 after a warm-up of 20 %: 20 - 18 (t - 0.2) / 0.8."""
    assert linear_beta(t, 20, 2, 0.2) == pytest.approx(beta)


def test_without_warm_up() -> None:
    assert [linear_beta(t / 4, start=10, end=4, warmup=0) for t in range(5)] == pytest.approx([10, 8.5, 7, 5.5, 4])


def test_falls_at_every_step() -> None:
    values = [linear_beta(0.25 + t / 200, 20, 2, 0.2) for t in range(150)]
    assert all(a is not None and b is not None and a > b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize('t', [0, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
def test_half_a_cosine(t: float) -> None:
    assert cosine(t) == pytest.approx(math.cos(math.pi * t / 2) ** 2)


def test_cosine_stays_at_zero() -> None:
    assert cosine(1.0) == pytest.approx(0, abs=1e-15)
    assert cosine(1.7) == pytest.approx(0, abs=1e-15)


def test_constant() -> None:
    assert {constant(t) for t in (0, 0.5, 1, 2)} == {1.0}


@pytest.mark.parametrize(
    'name',
    ['fake_quants.masks', 'fake_quants.ops', *(f'reconstruction.{m}' for m in ('callbacks', 'methods', 'schedules'))],
)
def test_examples_of_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f'mmbrecq.{name}'))
    assert result.attempted > 0 and result.failed == 0
