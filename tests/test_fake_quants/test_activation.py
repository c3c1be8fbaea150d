from __future__ import annotations

import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mmbrecq.errors import ExportError
from mmbrecq.fake_quants import LSQ, FakeQuantize
from mmbrecq.fake_quants.masks import RandomMasks
from mmbrecq.observers.base import MinMaxObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import FAKE_QUANTS

BOTH = pytest.mark.parametrize('cls', [FakeQuantize, LSQ])


pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on(fake_quant: FakeQuantize, scale: Tensor | float, zero_point: Tensor | int = 0) -> FakeQuantize:
    fake_quant.set_grid(torch.as_tensor(scale), torch.as_tensor(zero_point))
    fake_quant.enabled = True
    return fake_quant


def reference(x: Tensor, scale: np.ndarray, zero_point: np.ndarray, qtype: QType) -> np.ndarray:
    codes = np.rint(x.numpy() / scale.astype(np.float32)) + zero_point
    return (np.clip(codes, qtype.quant_min, qtype.quant_max) - zero_point) * scale


def test_both_are_registered() -> None:
    assert FAKE_QUANTS.get('FakeQuantize') is FakeQuantize
    assert FAKE_QUANTS.get('LSQ') is LSQ


@BOTH
def test_off_hands_the_very_tensor_through(cls: type[FakeQuantize]) -> None:
    x = noise(2, 3, 4, 4)
    fake_quant = on(cls(QType(2)), 0.7)
    fake_quant.enabled = False
    assert fake_quant(x) is x


@BOTH
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_values_per_tensor(cls: type[FakeQuantize], bits: int) -> None:
    qtype = QType(bits, symmetric=False, signed=False)
    scale, zero = 3 / qtype.levels, qtype.levels // 3
    x = noise(2, 3, 4, 4)
    out = on(cls(qtype), scale, zero)(x)
    np.testing.assert_allclose(out.detach().numpy(), reference(x, np.array(scale), np.array(zero), qtype), rtol=1e-6)
    assert len(torch.unique(out)) <= qtype.levels


@BOTH
def test_values_per_channel(cls: type[FakeQuantize]) -> None:
    qtype = QType(4, symmetric=False, signed=False, ch_axis=1)
    fake_quant = cls(qtype, channels=3)
    assert fake_quant.scale.shape == fake_quant.zero_point.shape == (3,)
    scale, zero = torch.tensor([0.125, 0.3125, 0.5]), torch.tensor([0, 7, 15])
    x = noise(2, 3, 4, 4)
    expected = reference(x, scale.numpy().reshape(1, 3, 1, 1), zero.numpy().reshape(1, 3, 1, 1), qtype)
    np.testing.assert_allclose(on(fake_quant, scale, zero)(x).detach().numpy(), expected, rtol=1e-6)


@BOTH
def test_a_scale_keeps_eight_significant_bits(cls: type[FakeQuantize]) -> None:
    fake_quant = on(cls(QType(4)), 1.003)  # the steps between 1 and 2 are 1/128
    assert float(fake_quant.scale) == 1.0
    fake_quant.set_grid(torch.tensor(1.005), fake_quant.zero_point)
    assert float(fake_quant.scale) == 1 + 1 / 128


@BOTH
def test_a_full_scale_keeps_all_its_bits(cls: type[FakeQuantize]) -> None:
    fake_quant = on(cls(QType(4), full_scale=True), 1.003)
    assert float(fake_quant.scale) == float(np.float32(1.003))


@BOTH
def test_the_observer_sees_the_float_values(cls: type[FakeQuantize]) -> None:
    fake_quant = on(cls(QType(2)), 0.1)
    observer = MinMaxObserver(fake_quant.qtype)
    fake_quant.observer = observer
    fake_quant(torch.tensor([-5.0, 1.0]))
    fake_quant.enabled = False
    fake_quant(torch.tensor([9.0, 1.0]))
    assert observer.batches == 2
    assert (float(observer.low), float(observer.high)) == (-5.0, 9.0)  # type: ignore[arg-type]


@BOTH
def test_the_grid_is_state(cls: type[FakeQuantize]) -> None:
    fake_quant = on(cls(QType(4, symmetric=False, signed=False)), 0.37, 5)
    other = cls(fake_quant.qtype)
    other.load_state_dict(fake_quant.state_dict())
    other.enabled = True
    assert set(fake_quant.state_dict()) == {'scale', 'zero_point'}
    assert other.zero_point.dtype == torch.uint8
    x = noise(3, 4)
    assert torch.equal(other(x), fake_quant(x))


def test_only_lsq_learns_its_scale() -> None:
    assert not list(FakeQuantize(QType(4)).parameters())
    lsq = LSQ(QType(4))
    assert isinstance(lsq.scale, nn.Parameter)
    assert not lsq.scale.requires_grad
    learned = lsq.scale
    lsq.set_grid(torch.tensor(0.25), torch.tensor(0))
    assert float(learned) == 0.25
    assert lsq.scale is learned


def test_lsq_descends_to_the_better_scale() -> None:
    """On 2 bits the best scale of these values is 1: -2, -1, 0 and 1 lie on the grid."""
    lsq = on(LSQ(QType(2)), 1.3)
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(8)
    optimizer = torch.optim.SGD([lsq.scale.requires_grad_(True)], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (lsq(x) - x).square().mean().backward()
        optimizer.step()
    # the straight-through gradient fades with the square of what is left
    assert float(lsq.scale.detach()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize('prob', [0.2, 0.5, 0.9])
def test_dropping_passes_the_float_value_on(prob: float) -> None:
    fake_quant = on(LSQ(QType(2)), 0.8)
    x = noise(64, 8, 8, 8)
    quantized = fake_quant(x).detach()
    fake_quant.masks = RandomMasks(1 - prob, torch.Generator().manual_seed(1))
    mixed = fake_quant(x).detach()
    is_float, is_quantized = mixed == x, mixed == quantized
    assert (is_float | is_quantized).all()
    # five standard deviations of a binomial share
    share, sigma = float(is_float.double().mean()), (prob * (1 - prob) / x.numel()) ** 0.5
    assert abs(share - prob) < 5 * sigma
    # per element, not per image or channel
    per_channel = is_float.double().mean((0, 2, 3))
    assert ((per_channel > 0) & (per_channel < 1)).all()
    assert float(per_channel.std()) < 5 * sigma * 8**0.5


def test_dropping_is_for_training_alone() -> None:
    fake_quant = on(LSQ(QType(2)), 0.8)
    x = noise(4, 8)
    quantized = fake_quant(x).detach()
    fake_quant.masks = RandomMasks(0.5, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(fake_quant(x), quantized)


def test_dropping_draws_from_its_generator() -> None:
    fake_quant = on(LSQ(QType(2)), 0.8)
    x = noise(4, 64)
    draws = []
    for seed in (1, 1, 2):
        fake_quant.masks = RandomMasks(0.5, torch.Generator().manual_seed(seed))
        draws.append(fake_quant(x).detach())
        torch.rand(3)  # the global generator plays no part
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gradients_where_dropped() -> None:
    """A float value takes the whole gradient and gives none to the scale."""
    fake_quant = on(LSQ(QType(2)), 0.8)
    scale = fake_quant.scale.requires_grad_(True)
    fake_quant.masks = RandomMasks(0.5, torch.Generator().manual_seed(0))
    x = torch.full((1000,), 50.0, requires_grad=True)
    fake_quant(x).sum().backward()
    assert x.grad is not None
    kept = x.grad == 0  # cut by the grid
    assert 0 < int(kept.sum()) < 1000
    assert float(scale.grad) == pytest.approx(int(kept.sum()) * fake_quant.qtype.quant_max)  # type: ignore[arg-type]


def exported(fake_quant: FakeQuantize, x: Tensor) -> onnx.ModelProto:
    file = io.BytesIO()
    torch.onnx.export(fake_quant, (x,), file, opset_version=17, dynamo=False, input_names=['x'])
    return onnx.load_from_string(file.getvalue())


def run_onnx(model: onnx.ModelProto, x: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return session.run(None, {'x': x.numpy()})[0]


@pytest.mark.parametrize('integer_clip', [True, False])
@pytest.mark.parametrize(
    ('qtype', 'zero'),
    [
        (QType(4, symmetric=False, signed=False), 6),
        (QType(3), 0),
        (QType(8, symmetric=False, signed=False), 6),
        (QType(4, symmetric=True, signed=False, int8_only=True), 0),
    ],
    ids=['u4', 's3', 'u8', 'u4-in-int8'],
)
def test_exported_operators_compute_the_same(qtype: QType, zero: int, integer_clip: bool) -> None:
    # a power of two: the runtime's own order of operations cannot move a value across a rounding boundary
    fake_quant = on(FakeQuantize(qtype, integer_clip=integer_clip), 0.25, zero)
    x = noise(2, 3, 4, 4) * qtype.levels / 4
    model = exported(fake_quant, x)
    operators = [node.op_type for node in model.graph.node if node.op_type != 'Constant']
    if qtype.bits == 8:
        assert operators == ['QuantizeLinear', 'DequantizeLinear']
    elif integer_clip:
        assert operators == ['QuantizeLinear', 'Clip', 'DequantizeLinear']
    else:
        assert operators == ['Clip', 'QuantizeLinear', 'DequantizeLinear']
    np.testing.assert_array_equal(run_onnx(model, x), fake_quant(x).numpy())


def test_exported_per_channel() -> None:
    qtype = QType(4, symmetric=False, signed=False, ch_axis=1)
    fake_quant = on(FakeQuantize(qtype, channels=3), torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0, 7, 15]))
    x = noise(2, 3, 4, 4) * 4
    np.testing.assert_array_equal(run_onnx(exported(fake_quant, x), x), fake_quant(x).numpy())


def test_no_real_clip_per_channel() -> None:
    fake_quant = on(FakeQuantize(QType(4, ch_axis=1), channels=3, integer_clip=False), torch.ones(3), torch.zeros(3))
    with pytest.raises(ExportError, match='expected a grid per tensor below 8 bits to export, but got one per channel'):
        exported(fake_quant, noise(2, 3, 4, 4))
