from __future__ import annotations

import re
from typing import Any

import pytest

from mmbrecq.errors import ConfigError
from mmbrecq.reconstruction import BRECQReconstructor, QDropReconstructor, StageOptions


@pytest.mark.parametrize('name', ['iterations', 'batch_size'])
@pytest.mark.parametrize('value', [0, -1, 2.5, '10', True])
def test_counts_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf'^expected {name} of a reconstruction to be an integer >= 1, but got {value!r}$'
    ):
        StageOptions(**{name: value})


@pytest.mark.parametrize('name', ['warmup', 'drop_prob', 'plateau'])
@pytest.mark.parametrize('value', [-0.1, 1, 1.5, True])
def test_fractions_are_below_one(name: str, value: float) -> None:
    with pytest.raises(
        ConfigError, match=rf'^expected {name} of a reconstruction to be a number in \[0, 1\), but got {value!r}$'
    ):
        StageOptions(**{name: value})


@pytest.mark.parametrize('name', ['lr', 'bias_lr', 'weight_scale_lr', 'activation_lr', 'round_weight'])
@pytest.mark.parametrize('value', [-1e-3, float('inf'), float('nan'), '1e-3', True])
def test_rates_and_weights_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(
        ConfigError,
        match=rf'^expected {name} of a reconstruction to be a number in \[0, inf\), but got {re.escape(repr(value))}$',
    ):
        StageOptions(**{name: value})


@pytest.mark.parametrize(('iterations', 'expected'), [(20000, 1e-3), (5000, 2e-3), (200, 1e-2)])
def test_fewer_iterations_round_in_larger_steps(iterations: int, expected: float) -> None:
    assert StageOptions(iterations=iterations).rounding_lr == pytest.approx(expected)
    assert StageOptions(iterations=iterations, lr=3e-3).rounding_lr == 3e-3


def test_ranges_are_fitted_or_not() -> None:
    with pytest.raises(ConfigError, match="'fit_ranges' of reconstructor.weights to be True or False or None, but"):
        BRECQReconstructor(weights={'fit_ranges': 'y'})


@pytest.mark.parametrize('beta', [(20.0,), (20.0, 10.0, 2.0), (20.0, 1.0), (0.5, 2.0), 5, '20'])
def test_beta_is_two_numbers_above_one(beta: Any) -> None:
    with pytest.raises(ConfigError, match='^expected beta of a reconstruction to be two numbers above 1, but got '):
        StageOptions(beta=beta)


def test_brecq_learns_weights_then_activations() -> None:
    first, second = BRECQReconstructor(weights={'iterations': 7}, activations={'iterations': 9, 'lr': 0.5}).stages
    assert (first.name, first.learns_rounding, first.quantizes_activations, first.options.iterations) == (
        'weights', True, False, 7,
    )  # fmt: skip
    assert (second.name, second.learns_rounding, second.quantizes_activations, second.options.iterations) == (
        'activations', False, True, 9,
    )  # fmt: skip
    assert second.options.lr == 0.5


def test_qdrop_learns_both_at_once_and_drops() -> None:
    (stage,) = QDropReconstructor(joint={'iterations': 7}).stages
    assert (stage.name, stage.learns_rounding, stage.quantizes_activations) == ('joint', True, True)
    assert 0 < stage.options.drop_prob < 1
    assert QDropReconstructor(joint={'drop_prob': 0.0}).stages[0].options.drop_prob == 0


@pytest.mark.parametrize(
    ('cls', 'key'),
    [(BRECQReconstructor, 'weights'), (BRECQReconstructor, 'activations'), (QDropReconstructor, 'joint')],
)
def test_options_are_checked(cls: type, key: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^unknown option 'iters' of reconstructor\.{key}: expected iterations or ",
    ):
        cls(**{key: {'iters': 5}})
    with pytest.raises(ConfigError, match=rf'^expected reconstructor\.{key} to be a dict, but got 5$'):
        cls(**{key: 5})


def test_an_unknown_loss() -> None:
    with pytest.raises(ConfigError, match=r"unknown reconstruction loss type 'L3Loss': expected one of .*, MSELoss"):
        BRECQReconstructor(loss={'type': 'L3Loss'})
