from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_grids import GRIDS, SHAPE, problem
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants import AdaRound, NearestRounding, PackedWeight, WeightFakeQuantize
from mmbrecq.fake_quants.weight import original_weight, pack_weight, weight_fake_quant
from mmbrecq.qtype import QType
from mmbrecq.registry import FAKE_QUANTS

ZETA, GAMMA = 1.1, -0.1


def as_numpy(qtype: QType, *values: Tensor, dim: int = 4) -> list[np.ndarray]:
    """Values per channel as float64 arrays that broadcast with the weight."""
    shape = [1] * dim
    if qtype.ch_axis is not None:
        shape[qtype.ch_axis] = -1
    return [v.detach().double().numpy().reshape(shape) for v in values]


def calibrated(cls: type[WeightFakeQuantize], qtype: QType) -> tuple[WeightFakeQuantize, Tensor]:
    weight, scale, zero_point = problem(qtype)
    fake_quant = cls(qtype, weight.shape)
    fake_quant.calibrate(weight, scale, zero_point)
    return fake_quant, weight


def ratio_and_offset(fake_quant: WeightFakeQuantize, weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """``weight / scale`` with the single precision of the product, and the zero-point."""
    scale, zero = as_numpy(fake_quant.qtype, fake_quant.scale, fake_quant.zero_point)
    return weight.numpy() / scale.astype(np.float32), zero


def quantized_layer(module: nn.Module, qtype: QType, cls: type[WeightFakeQuantize] = NearestRounding) -> nn.Module:
    weight, scale, zero_point = problem(qtype, tuple(module.weight.shape))
    with torch.no_grad():
        module.weight.copy_(weight)
    fake_quant = cls(qtype, weight.shape)
    module.weight.requires_grad_(False)
    parametrize.register_parametrization(module, 'weight', fake_quant, unsafe=True)
    fake_quant.calibrate(weight, scale, zero_point)
    fake_quant.enabled = True
    return module


def test_both_are_registered() -> None:
    assert FAKE_QUANTS.get('AdaRound') is AdaRound
    assert FAKE_QUANTS.get('NearestRounding') is NearestRounding


@pytest.mark.parametrize('cls', [NearestRounding, AdaRound])
@pytest.mark.parametrize('qtype', GRIDS)
def test_calibrate_rounds_to_nearest(cls: type[WeightFakeQuantize], qtype: QType) -> None:
    fake_quant, weight = calibrated(cls, qtype)
    ratio, zero = ratio_and_offset(fake_quant, weight)
    codes = np.clip(np.rint(ratio) + zero, qtype.quant_min, qtype.quant_max)
    np.testing.assert_array_equal(fake_quant.codes.numpy(), codes)
    assert fake_quant.codes.dtype == qtype.container
    (scale,) = as_numpy(qtype, fake_quant.scale)
    np.testing.assert_allclose(fake_quant.values.numpy(), (codes - zero) * scale, rtol=1e-6)
    assert (codes == qtype.quant_min).any()
    assert (codes == qtype.quant_max).any()


def test_the_switch() -> None:
    fake_quant, weight = calibrated(NearestRounding, QType(2, ch_axis=0))
    assert fake_quant(weight) is weight
    fake_quant.enabled = True
    assert torch.equal(fake_quant(weight), fake_quant.values)
    assert not torch.equal(fake_quant(weight), weight)


def test_a_learned_weight_is_in_force() -> None:
    fake_quant, weight = calibrated(NearestRounding, QType(4, ch_axis=0))
    fake_quant.learned = torch.zeros(SHAPE)
    assert fake_quant(weight) is weight
    fake_quant.enabled = True
    assert fake_quant(weight) is fake_quant.learned


@pytest.mark.parametrize('cls', [NearestRounding, AdaRound])
def test_state_goes_round_bit_for_bit(cls: type[WeightFakeQuantize]) -> None:
    fake_quant, weight = calibrated(cls, QType(3, symmetric=False, signed=False, ch_axis=0))
    other = cls(fake_quant.qtype, weight.shape)
    other.load_state_dict(fake_quant.state_dict())
    assert set(fake_quant.state_dict()) == {'scale', 'zero_point', 'codes'}
    assert torch.equal(other.values, fake_quant.values)


LAYERS = [
    pytest.param(lambda: nn.Conv2d(4, 6, 3), QType(2, symmetric=False, signed=False, ch_axis=0), id='conv'),
    pytest.param(lambda: nn.Linear(5, 3, bias=False), QType(4, ch_axis=0), id='linear'),
    pytest.param(lambda: nn.ConvTranspose2d(4, 6, 2), QType(8, ch_axis=1, spare_bits=1), id='transposed'),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, groups=2), QType(3), id='per-tensor'),
]


@pytest.mark.parametrize(('make', 'qtype'), LAYERS)
def test_packing_changes_no_value(make, qtype: QType) -> None:
    module = quantized_layer(make(), qtype)
    fake_quant = weight_fake_quant(module)
    assert fake_quant is not None
    before, codes = module.weight.clone(), fake_quant.codes.clone()
    pack_weight(module)
    assert torch.equal(module.weight, before)
    assert weight_fake_quant(module) is None
    state = {k.removeprefix('parametrizations.weight.'): v for k, v in module.state_dict().items() if 'weight' in k}
    assert set(state) == {'original0', 'original1', 'original2'}
    assert torch.equal(state['original0'], codes)
    assert state['original0'].dtype == qtype.container
    assert torch.equal(state['original1'], fake_quant.scale)
    assert torch.equal(state['original2'], fake_quant.zero_point)


@pytest.mark.parametrize(('make', 'qtype'), LAYERS)
def test_a_packed_state_loads_into_a_packed_module(make, qtype: QType) -> None:
    module, other = quantized_layer(make(), qtype), make()
    pack_weight(module)
    blank = [torch.zeros_like(t) for t in (p for n, p in module.state_dict().items() if 'weight' in n)]
    other.weight.requires_grad_(False)
    parametrize.register_parametrization(other, 'weight', PackedWeight(qtype, *blank), unsafe=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(copy.deepcopy(module).weight, module.weight)


def test_the_float_weight_stays_until_packed() -> None:
    module = quantized_layer(nn.Conv2d(4, 6, 3), QType(2, ch_axis=0))
    expected, _, _ = problem(QType(2, ch_axis=0), (6, 4, 3, 3))
    assert torch.equal(original_weight(module), expected)
    fake_quant = weight_fake_quant(module)
    assert fake_quant is not None
    fake_quant.enabled = False
    assert torch.equal(module.weight, expected)


def test_a_float_module_has_no_fake_quantizer() -> None:
    assert weight_fake_quant(nn.Conv2d(1, 1, 1)) is None
