from __future__ import annotations

import math

import pytest

from mmbrecq.reconstruction.plateau import Plateau


def test_a_loss_that_falls_by_less_ends_it() -> None:
    plateau = Plateau(0.1)
    assert [plateau.reached(loss) for loss in (10.0, 8.9, 8.02, 5.0)] == [False, False, True, False]


def test_the_best_so_far_counts() -> None:
    plateau = Plateau(0.1)
    assert [plateau.reached(loss) for loss in (10.0, 5.0, 9.0, 4.6, 4.0)] == [False, False, True, True, False]


@pytest.mark.parametrize('loss', [1.0, 2.0, math.inf])
def test_nothing_ends_it_by_default(loss: float) -> None:
    plateau = Plateau(0.0)
    assert not any(plateau.reached(loss) for _ in range(3))
