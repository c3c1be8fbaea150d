from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mmbrecq.errors import ConfigError
from mmbrecq.qtype import QType


@pytest.mark.parametrize(
    ('options', 'low', 'high', 'container'),
    [
        ({'bits': 8}, -128, 127, torch.int8),
        ({'bits': 8, 'signed': False}, 0, 255, torch.uint8),
        ({'bits': 8, 'spare_bits': 1}, -64, 63, torch.int8),
        ({'bits': 8, 'spare_bits': 1, 'signed': False}, 0, 127, torch.uint8),
        ({'bits': 4}, -8, 7, torch.int8),
        ({'bits': 4, 'signed': False}, 0, 15, torch.uint8),
        ({'bits': 4, 'signed': False, 'int8_only': True}, 0, 15, torch.int8),
        ({'bits': 2}, -2, 1, torch.int8),
        ({'bits': 2, 'signed': False}, 0, 3, torch.uint8),
    ],
)
def test_range_and_container(options: Any, low: int, high: int, container: torch.dtype) -> None:
    qtype = QType(**options)
    assert (qtype.quant_min, qtype.quant_max) == (low, high)
    assert qtype.levels == len(range(low, high + 1))
    assert qtype.container == container


@pytest.mark.parametrize('options', [{'signed': True}, {'signed': False}])
def test_every_grid_fits_its_container(options: Any) -> None:
    for bits in range(2, 9):
        qtype = QType(bits, **options)
        info = torch.iinfo(qtype.container)
        assert info.min <= qtype.quant_min <= 0 < qtype.quant_max <= info.max
        assert qtype.levels == 2**bits


@pytest.mark.parametrize('bits', [1, 9, 0, -4, 4.0, '4', None, True])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(ConfigError, match=rf'^expected bits in 2\.\.8, but got {bits!r}$'):
        QType(bits)


@pytest.mark.parametrize(('bits', 'spare'), [(2, 1), (8, 7), (8, -1)])
def test_spare_bits_leave_two(bits: int, spare: int) -> None:
    with pytest.raises(ConfigError, match=rf'^expected spare_bits to leave 2 of {bits} bits, but got {spare}$'):
        QType(bits, spare_bits=spare)
    assert QType(8, spare_bits=6).levels == 4


def test_scale_shape() -> None:
    shape = torch.Size([6, 4, 3, 3])
    assert QType(4).scale_shape(shape) == ()
    assert QType(4, ch_axis=0).scale_shape(shape) == (6,)
    assert QType(4, ch_axis=1).scale_shape(shape) == (4,)


def test_is_a_value() -> None:
    assert QType(4, ch_axis=0) == QType(4, ch_axis=0)
    assert len({QType(4), QType(4), QType(3)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QType(4).bits = 8  # type: ignore[misc]
