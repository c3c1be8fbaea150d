from __future__ import annotations

import re
from typing import Any

import pytest

from mmbrecq.building import parse_options
from mmbrecq.errors import ConfigError, PatternError
from mmbrecq.quantizers import BRECQQuantizer
from mmbrecq.quantizers.options import (
    ActivationOptions,
    Override,
    WeightOptions,
    assign_bits,
    check_bits,
)

LAYERS = ['stem', 'body.0', 'body.1', 'fc']


@pytest.mark.parametrize('bits', [2, 3, 8])
def test_bits_in_range(bits: int) -> None:
    assert check_bits(bits, 'here') == bits


@pytest.mark.parametrize('bits', [None, 'float'])
def test_bits_of_a_float_layer(bits: Any) -> None:
    assert check_bits(bits, 'here') is None


@pytest.mark.parametrize('bits', [1, 9, 0, -4, 32, 4.0, '4', True, 'int4'])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"expected here to be in 2..8 or 'float', but got {bits!r}")):
        check_bits(bits, 'here')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'weight': {'bits': 9}}, "expected quantizer.weight.bits to be in 2..8 or 'float', but got 9"),
        (
            {'weight': {'bits': 4}, 'activation': {'bits': 1}},
            "expected quantizer.activation.bits to be in 2..8 or 'float', but got 1",
        ),
        (
            {'weight': {'bits': 4, 'bit': 2}},
            "unknown option 'bit' of quantizer.weight: "
            'expected bits or per_channel or symmetric or observer or rounding',
        ),
        (
            {'weight': {'bits': 4}, 'activation': {'bits': 4, 'rounding': {}}},
            "unknown option 'rounding' of quantizer.activation: "
            'expected bits or per_channel or symmetric or observer or fake_quant',
        ),
        (
            {'weight': {'bits': 4}, 'overrides': [{'pattern': '*'}, {'pattern': '*', 'bits': 4}]},
            "unknown option 'bits' of quantizer.overrides[1]: "
            'expected pattern or weight_bits or activation_bits or reason',
        ),
        (
            {'weight': {'per_channel': True}},
            "expected option 'bits' of quantizer.weight, but it was not given",
        ),
        (
            {'weight': {'bits': 4, 'per_channel': 'no'}},
            "expected option 'per_channel' of quantizer.weight to be True or False, but got 'no'",
        ),
        (
            {'weight': 4},
            'expected quantizer.weight to be a dict, but got 4',
        ),
        (
            {'weight': {'bits': 4}, 'granularity': 'blocks'},
            "expected quantizer.granularity to be one of ['layer', 'block', 'stage', 'net'], but got 'blocks'",
        ),
        (
            {'weight': {'bits': 4}, 'preset': 'ort'},
            "expected preset to be one of ['academic', 'onnxruntime', 'openvino', 'tensorrt'], but got 'ort'",
        ),
    ],
)
def test_wrong_option_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f'^{re.escape(message)}$'):
        BRECQQuantizer(**arguments)


def test_defaults() -> None:
    weight, activation = (
        parse_options(WeightOptions, {'bits': 2}, 'w'),
        parse_options(ActivationOptions, {'bits': 4}, 'a'),
    )
    assert (weight.per_channel, activation.per_channel) == (True, False)
    assert weight.symmetric is activation.symmetric is None
    assert weight.observer == activation.observer == {'type': 'MSEObserver', 'p': 2.4}
    assert (weight.rounding, activation.fake_quant) == ({'type': 'AdaRound'}, {'type': 'LSQ'})


def test_first_and_last_keep_eight_bits() -> None:
    assert assign_bits(LAYERS, {'stem', 'fc'}, 2, 4, []) == {
        'stem': (8, 8), 'body.0': (2, 4), 'body.1': (2, 4), 'fc': (8, 8)
    }  # fmt: skip
    assert assign_bits(LAYERS, set(), 2, 4, []) == dict.fromkeys(LAYERS, (2, 4))


def test_float_stays_float_in_the_first_and_last_layer() -> None:
    assert assign_bits(LAYERS, {'stem'}, 2, None, [])['stem'] == (8, None)
    assert assign_bits(LAYERS, {'stem'}, None, 4, [])['stem'] == (None, 8)


def test_overrides_apply_in_order_and_leave_what_they_do_not_name() -> None:
    overrides = [
        Override('body.*', weight_bits=4),
        Override('body.1', weight_bits=6, activation_bits='float'),
        Override('stem', weight_bits='float'),
        Override('f?', activation_bits=3),
    ]
    assert assign_bits(LAYERS, {'stem', 'fc'}, 2, 4, overrides) == {
        'stem': (None, 8), 'body.0': (4, 4), 'body.1': (6, None), 'fc': (8, 3)
    }  # fmt: skip


def test_override_that_matches_no_layer() -> None:
    message = (
        "expected quantizer.overrides[1].pattern to match a layer, but 'head.*' matches none of 4 (the first is stem)"
    )
    with pytest.raises(PatternError, match=re.escape(message)):
        assign_bits(LAYERS, set(), 2, 4, [Override('stem', weight_bits=4), Override('head.*', weight_bits=4)])


def test_bits_of_an_override_out_of_range() -> None:
    message = "expected quantizer.overrides[0].activation_bits to be in 2..8 or 'float', but got 16"
    with pytest.raises(ConfigError, match=re.escape(message)):
        assign_bits(LAYERS, set(), 2, 4, [Override('stem', activation_bits=16)])
