from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from small_models import Apply, calibrate, classifier, conv, images, net, prepare, relative_error, residual, run
from torch import Tensor, nn

from mmbrecq.errors import ConfigError, GraphError, PatternError
from mmbrecq.fake_quants import LSQ, AdaRound, FakeQuantize, NearestRounding
from mmbrecq.presets import PRESETS
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel
from mmbrecq.registry import QUANTIZERS


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('name', ['resnet', 'mobilenetv2', 'regnet', 'vgg'])
def test_prepared_model_without_quantization_is_the_float_model(name: str, preset: str) -> None:
    model, x = classifier(name), images(5, seed=1)
    wanted = run(lambda v: model(v, mode='tensor'), x)
    prepared = prepare(model, preset, 2, 4)
    assert relative_error(run(prepared, x), wanted) < 1e-5
    assert relative_error(run(lambda v: model(v, mode='tensor'), x), wanted) < 1e-5
    with calibrate(prepared).quantization(weights=False, activations=False):
        assert relative_error(run(prepared, x), wanted) < 1e-5
    with prepared.quantization(weights=True, activations=True):
        assert relative_error(run(prepared, x), wanted) > 0.01


def bits(model: QuantizedModel) -> dict[str, tuple[int | None, int | None]]:
    return {layer.name.removeprefix('backbone.'): (layer.weight_bits, layer.activation_bits) for layer in model.layers}


def grids(model: QuantizedModel) -> dict[str, int]:
    """Bits of the activation quantizers by the name of their place."""
    prefix = 'activation_quantizers.'
    return {
        name.removeprefix(prefix).removeprefix('backbone_'): q.qtype.bits
        for name, q in model.image_graph.quantizers.items()
    }


def test_first_and_last_layer_at_eight_bits_is_a_switch() -> None:
    body = dict.fromkeys(('conv1', 'conv2', 'down'), (2, 4))
    on, off = (prepare(residual(), 'academic', 2, 4, first_last_8bit=switch) for switch in (True, False))
    assert bits(on) == {'stem': (8, 8), **body, 'fc': (8, 8)}
    assert bits(off) == {'stem': (2, 4), **body, 'fc': (2, 4)}
    inner = {'stem_relu': 4, 'relu1': 4, 'out_relu': 4}
    assert grids(on) == {'inputs': 8, **inner, 'gap': 8}
    assert grids(off) == {'inputs': 4, **inner, 'gap': 4}
    assert {name: fq.qtype.bits for name, _, fq in on.weights()} == {
        f'backbone.{name}': weight for name, (weight, _) in bits(on).items()
    }


def test_the_step_of_the_images_is_not_learned_at_eight_bits() -> None:
    for switch in (True, False):
        model = prepare(residual(), 'academic', 2, 4, first_last_8bit=switch)
        fixed = {
            name.removeprefix('activation_quantizers.') for name, q in model.image_graph.quantizers.items() if q.fixed
        }
        assert fixed == ({'inputs'} if switch else set())


def test_all_first_and_all_last_layers_count() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.middle(torch.relu(self.left(x) + self.right(x))))
        return self.score(y), self.box(y)

    model = net(forward, left=conv(), right=conv(), middle=conv(4, 4), score=conv(4, 2), box=conv(4, 3))
    found = bits(prepare(model, 'academic', 2, 4))
    assert {name for name, pair in found.items() if pair == (8, 8)} == {'left', 'right', 'score', 'box'}
    assert found['middle'] == (2, 4)


def test_overrides_by_pattern() -> None:
    overrides = [
        {'pattern': 'backbone.conv*', 'weight_bits': 5},
        {'pattern': 'backbone.conv2', 'activation_bits': 6},
        {'pattern': 'backbone.fc', 'weight_bits': 'float', 'activation_bits': 'float'},
    ]
    model = prepare(residual(), 'academic', 2, 4, overrides=overrides)
    assert bits(model) == {'stem': (8, 8), 'conv1': (5, 4), 'conv2': (5, 6), 'down': (2, 4), 'fc': (None, None)}
    assert grids(model) == {'inputs': 8, 'stem_relu': 4, 'relu1': 6, 'out_relu': 4}
    assert 'backbone.fc' not in {name for name, *_ in model.weights()}


def test_value_with_several_readers_has_the_bits_of_the_most_demanding() -> None:
    model = prepare(residual(), 'academic', 2, 4, overrides=[{'pattern': 'backbone.down', 'activation_bits': 7}])
    assert grids(model)['stem_relu'] == 7


def test_override_that_matches_no_layer_of_the_model() -> None:
    message = (
        "expected quantizer.overrides[0].pattern to match a layer, but 'head.*' matches none of 5 "
        '(the first is backbone.stem)'
    )
    with pytest.raises(PatternError, match=re.escape(message)):
        prepare(residual(), 'academic', 2, 4, overrides=[{'pattern': 'head.*', 'weight_bits': 4}])


@pytest.mark.parametrize('preset', PRESETS)
def test_activations_in_float(preset: str) -> None:
    """W4A32: no activation quantizer at all, and the weights alone are switched."""
    model = calibrate(prepare(residual(), preset, 4, None))
    assert model.image_graph.quantizers == {}
    assert set(bits(model).values()) == {(4, None), (8, None)}
    x = images()
    with model.quantization(weights=True, activations=True):
        both = run(model, x)
    with model.quantization(weights=True, activations=False):
        torch.testing.assert_close(run(model, x), both, rtol=0, atol=0)
    assert relative_error(both, run(model, x)) > 1e-3


def test_layer_list_says_why_a_layer_is_float() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.kept(torch.relu(self.first(x)))))

    model = net(forward, first=conv(), kept=conv(4, 4), last=conv(4, 2), unused=nn.Linear(3, 3))
    overrides = [{'pattern': 'backbone.kept', 'weight_bits': 'float', 'activation_bits': 'float'}]
    layers = {layer.name: layer for layer in prepare(model, 'academic', 2, 4, overrides=overrides).layers}
    assert set(layers) == {'backbone.first', 'backbone.kept', 'backbone.last', 'backbone.unused'}
    reasons = {name: layer.float_reason for name, layer in layers.items() if layer.float_reason is not None}
    assert reasons == {
        'backbone.kept': "the config says 'float'",
        'backbone.unused': 'it lies on no path from the images to the outputs',
    }
    assert {layer.kind for layer in layers.values()} == {'Conv2d', 'Linear'}
    assert layers['backbone.first'].unit == 'backbone.first'
    assert layers['backbone.unused'].unit is None


def test_layers_know_their_unit() -> None:
    model = prepare(classifier('resnet'), 'academic')
    by_unit = {layer: unit.name for unit in model.image_graph.units for layer in unit.layers}
    assert {layer.name: layer.unit for layer in model.layers} == by_unit
    assert by_unit['backbone.layer2.0.downsample.0'] == 'backbone.layer2.0'


class _Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.isfinite().all() else x


def test_layer_in_an_opaque_module_is_quantized_at_its_input() -> None:
    model = net(lambda self, x: self.last(self.odd(self.first(x))), first=conv(), odd=_Opaque(), last=conv(4, 2))
    prepared = prepare(model, 'academic', 2, 4)
    assert list(prepared.image_graph.traced.opaque) == ['backbone.odd']
    assert prepared.image_graph.opaque_inputs == {
        'backbone.odd.inner': 'activation_quantizers.backbone_odd_inner_input'
    }
    assert bits(prepared)['odd.inner'] == (2, 4)
    unit = next(unit for unit in prepared.image_graph.units if 'backbone.odd.inner' in unit.layers)
    quantizer = prepared.image_graph.quantizers[prepared.image_graph.opaque_inputs['backbone.odd.inner']]
    assert any(found is quantizer for found in prepared.image_graph.unit_quantizers(unit))
    calibrate(prepared)
    seen: list[Tensor] = []
    model.backbone.odd.inner.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    with prepared.quantization(weights=True, activations=True):
        run(prepared, images())
    steps = seen[0] / quantizer.scale
    assert (steps - steps.round()).abs().max() < 1e-4
    assert len(seen[0].unique()) <= 16


class _OpaqueReader(_Opaque):
    """Reads the weight of a layer that it never calls, as TOOD's head does."""

    def __init__(self) -> None:
        super().__init__()
        self.read = conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('oi,nihw->nohw', self.read.weight[:, :, 0, 0], super().forward(x))


def test_a_layer_that_an_opaque_module_does_not_call_stays_in_float() -> None:
    model = net(lambda self, x: self.odd(self.first(x)), first=conv(), odd=_OpaqueReader())
    weight = model.backbone.odd.read.weight.detach().clone()
    prepared = calibrate(prepare(model, 'academic', 2, 4))
    reasons = {layer.name: layer.float_reason for layer in prepared.layers}
    assert reasons == {
        'backbone.first': None,
        'backbone.odd.inner': None,
        'backbone.odd.read': 'it lies on no path from the images to the outputs',
    }
    with prepared.quantization(weights=True, activations=True):
        assert torch.equal(prepared.model.backbone.odd.read.weight, weight)
        run(prepared, images())


def test_weights_per_channel_and_per_tensor() -> None:
    transposed = nn.ConvTranspose2d(4, 6, 2, stride=2)
    grouped = nn.ConvTranspose2d(6, 6, 2, groups=2)
    model = net(
        lambda self, x: self.grouped(self.transposed(self.conv(x))), conv=conv(), transposed=transposed, grouped=grouped
    )
    shapes = {name: (fq.qtype.ch_axis, tuple(fq.scale.shape)) for name, _, fq in prepare(model, 'academic').weights()}
    # output channels of a transposed convolution lie on axis 1, within each group: with groups, one scale
    assert shapes == {
        'backbone.conv': (0, (4,)), 'backbone.transposed': (1, (6,)), 'backbone.grouped': (None, ())
    }  # fmt: skip
    quantizer = BRECQQuantizer({'bits': 4, 'per_channel': False})
    found = quantizer.prepare(residual(), images(2))
    assert all(fq.scale.shape == () for _, _, fq in found.weights())


def test_activations_per_channel() -> None:
    options = {'bits': 4, 'per_channel': True}
    model = calibrate(BRECQQuantizer({'bits': 4}, options).prepare(residual(), images(2)))
    shapes = {name.rpartition('.')[2]: tuple(q.scale.shape) for name, q in model.image_graph.quantizers.items()}
    assert shapes['inputs'] == (3,) and shapes['backbone_stem_relu'] == (4,)
    quantizer = model.image_graph.quantizers['activation_quantizers.inputs']
    x = images()
    with model.quantization(weights=False, activations=True):
        found = run(quantizer, x).numpy()
    scale, offset = (
        v.detach().numpy().astype(np.float32)[:, None, None] for v in (quantizer.scale, quantizer.zero_point)
    )
    wanted = (np.clip(np.round(x.numpy() / scale) + offset, 0, quantizer.qtype.quant_max) - offset) * scale
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert len(np.unique(scale)) == 3


@pytest.mark.parametrize(
    ('weight', 'activation', 'preset', 'message'),
    [
        ({'symmetric': False}, {}, 'openvino', "expected symmetric weights for the preset 'openvino'"),
        ({}, {'symmetric': False}, 'tensorrt', "expected symmetric activations for the preset 'tensorrt'"),
        ({}, {'per_channel': True}, 'openvino', "expected activations per tensor for the preset 'openvino'"),
    ],
)
def test_option_that_the_preset_forbids(
    weight: dict[str, Any], activation: dict[str, Any], preset: str, message: str
) -> None:
    quantizer = BRECQQuantizer({'bits': 8, **weight}, {'bits': 8, **activation}, preset)
    with pytest.raises(ConfigError, match=message):
        quantizer.prepare(residual(), images(2))


def test_types_of_the_config_are_built() -> None:
    cfg = {
        'type': 'BRECQQuantizer',
        'weight': {'bits': 4, 'rounding': {'type': 'NearestRounding'}},
        'activation': {'bits': 4, 'fake_quant': {'type': 'FakeQuantize'}},
    }
    model = QUANTIZERS.build(cfg).prepare(residual(), images(2))
    assert {type(fq) for _, _, fq in model.weights()} == {NearestRounding}
    assert {type(q) for q in model.image_graph.quantizers.values()} == {FakeQuantize}
    default = prepare(residual(), 'academic')
    assert {type(fq) for _, _, fq in default.weights()} == {AdaRound}
    assert {type(q) for q in default.image_graph.quantizers.values()} == {LSQ}


def test_unknown_type_lists_the_valid_ones() -> None:
    quantizer = BRECQQuantizer({'bits': 4, 'rounding': {'type': 'FlexRound'}})
    message = "unknown fake quant type 'FlexRound': expected one of AdaRound, FakeQuantize, LSQ, NearestRounding"
    with pytest.raises(ConfigError, match=message):
        quantizer.prepare(residual(), images(2))


def test_model_without_layers() -> None:
    with pytest.raises(GraphError, match='expected Net to have a convolution or linear layer, but found none'):
        prepare(net(lambda self, x: self.relu(x), relu=nn.ReLU()), 'academic')


def test_shared_layer_has_one_weight_and_a_grid_per_value() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.relu(self.stem(x))
        second = torch.relu(self.down(first))
        return self.head(first), self.head(second)

    model = prepare(
        net(forward, stem=conv(), down=conv(4, 4), head=Apply(lambda s, x: s.c(x), c=conv(4, 2))), 'academic'
    )
    assert [name for name, *_ in model.weights()] == ['backbone.stem', 'backbone.down', 'backbone.head.c']
    assert len(model.image_graph.quantizers) == 3
    assert bits(model)['head.c'] == (8, 8)


def test_parameters_are_frozen() -> None:
    model = prepare(residual(), 'academic')
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
