from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmbrecq
from mmbrecq import pipeline
from mmbrecq.errors import ConfigError
from mmbrecq.mixed_precision.diagnosis import GridLoss, GridLosses, diagnose, measure_grids
from mmbrecq.quantizers import BRECQQuantizer
from mmbrecq.quantizers.options import FallbackOptions


class Net(nn.Module):
    """Three linear layers behind activation functions, of which the second has a few massive values."""

    def __init__(self, massive: float = 1000.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        with torch.no_grad():
            self.first.weight[3] *= massive
            self.second.weight[:, 3] /= massive

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x)).flatten(2).transpose(1, 2)
        return 4 * self.third(F.gelu(self.second(F.gelu(self.first(x))))).mean(1)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def config(**fallback: Any) -> dict[str, Any]:
    return {
        'type': 'BRECQQuantizer', 'preset': 'openvino', 'weight': {'bits': 4}, 'activation': {'bits': 4},
        'fallback': {'bound': 1e-3, 'limit': 0.5, 'low_bound': None, **fallback},
    }  # fmt: skip


def test_the_layer_behind_massive_values_gets_them_in_float() -> None:
    found = pipeline.find_fallback(Net().eval(), images(), config())
    assert found is not None
    assert list(found.layers) == ['second']
    assert found.before > 1e-3 > found.after
    (override,) = found.overrides()
    assert (override['pattern'], override['weight_bits'], override['activation_bits']) == ('second', 'float', 'float')
    assert override['reason'].startswith('at 8 bits its input costs ') and override['reason'].endswith('(divergence)')
    assert str(found).endswith(' with 1 layers in float')


@pytest.mark.parametrize(
    ('model', 'fallback'),
    [(Net(massive=1.0), {}), (Net(), {'bound': 10.0}), (Net(), {'limit': 0.1})],
)
def test_nothing_stays_in_float_within_the_bound_or_beyond_the_limit(model: Net, fallback: dict[str, Any]) -> None:
    found = pipeline.find_fallback(model.eval(), images(), config(**fallback))
    assert found is not None and not found.layers and found.after == found.before
    assert not str(found).endswith('in float')


def test_nothing_is_looked_for_where_all_activations_are_to_lie_on_grids() -> None:
    assert pipeline.find_fallback(Net().eval(), images(), config(limit=0.0)) is None
    academic = {**config(), 'preset': 'academic', 'fallback': {'low_bound': None}}
    assert pipeline.find_fallback(Net().eval(), images(), academic) is None


@pytest.mark.parametrize('preset', ['academic', 'openvino'])
def test_an_input_that_fewer_bits_hurt_alone_gets_8(preset: str) -> None:
    model, asked = Net().eval(), {**config(limit=0.0, low_bound=0.001), 'preset': preset, 'first_last_8bit': False}
    found = pipeline.find_fallback(model, images(), asked)
    assert found is not None and not found.layers
    assert list(found.raised) == ['second']
    # what the grid alone costs, measured layer by layer
    losses = pipeline.find_grid_losses(model, images(4), asked, 4)
    alone = {grid.layers[0]: grid.loss for grid in losses.grids if grid.kind == 'activation' and grid.layers}
    assert found.raised == pytest.approx({layer: loss for layer, loss in alone.items() if loss > 0.001}, rel=1e-3)
    (override,) = found.overrides()
    assert override['reason'].startswith('with fewer bits its input alone costs the outputs ')
    assert str(found).startswith('inputs of layers get 8 bits, for fewer alone cost the outputs (divergence): second (')
    quantized = mmbrecq.quantize(
        model, images(), preset=preset, weight_bits=4, activation_bits=4, method='nearest',
        quantizer={'fallback': {'limit': 0.0, 'low_bound': 0.001}, 'first_last_8bit': False},
    )  # fmt: skip
    assert {layer.name: layer.activation_bits for layer in quantized.layers} == {
        'stem': 4, 'first': 4, 'second': 8, 'third': 4,
    }  # fmt: skip


def test_8_bits_are_not_raised() -> None:
    asked = {**config(limit=0.0, low_bound=0.0), 'activation': {'bits': 8}}
    assert pipeline.find_fallback(Net().eval(), images(), asked) is None


def test_errors_that_cancel_each_other_are_left_alone() -> None:
    model = BRECQQuantizer({'bits': 8}, {'bits': 8}, 'openvino', first_last_8bit=False).prepare(Net(), images(2))
    paths = list(model.image_graph.quantizers)
    single = dict.fromkeys(paths, 0.1) | {paths[1]: 3.0, paths[2]: 3.0}

    def loss(on: Sequence[str]) -> float:
        both = paths[1] in on and paths[2] in on
        return 1.0 if both else sum(single[path] for path in on)

    found = diagnose(model.image_graph, loss, 'distance', FallbackOptions(bound=0.5, limit=1.0))
    assert found.before == 1.0 and not found.layers


class Sums:
    """Losses that add up, of the weights and activations that are on; counts how often it is asked."""

    kind = 'distance'

    def __init__(self, single: dict[str, float]) -> None:
        self.single, self.asked = single, 0

    def of(self, layers: Sequence[str], quantizers: Sequence[str] = ()) -> float:
        self.asked += 1
        return sum(self.single[name] for name in [*layers, *quantizers])


def test_the_worst_grids_are_found_in_few_passes() -> None:
    model = BRECQQuantizer({'bits': 4}, {'bits': 8}, 'openvino', first_last_8bit=False).prepare(Net(), images(2))
    graph = model.image_graph
    names = [name for name, _, _ in graph.weights()] + list(graph.quantizers)
    single = {name: 0.01 * (1 + index) for index, name in enumerate(names)} | {'second': 3.0, names[-1]: 2.0}
    every = measure_grids(graph, Sums(single), 2)  # type: ignore[arg-type]
    assert {grid.name: grid.loss for grid in every.grids} == pytest.approx(single)
    assert [grid.bits for grid in every.grids if grid.kind == 'weight'] == [4] * 4
    assert (every.count, every.together) == (len(names), pytest.approx(sum(single.values())))
    assert [grid.loss for grid in every.grids] == sorted(single.values(), reverse=True)
    sums = Sums(single)
    few = measure_grids(graph, sums, 2, 6)  # type: ignore[arg-type]
    assert sums.asked <= 7
    assert few.grids[0].name == 'second' and few.count == len(names) > len(few.grids)
    assert measure_grids(graph, Sums(single), 2, len(names)) == every  # type: ignore[arg-type]


def test_the_grids_that_cost_more_than_a_bound_are_named() -> None:
    grids = [GridLoss('activation_quantizers.relu', 'activation', 8, 0.5)]
    grids += [GridLoss(f'fc{index}', 'weight', 4, 0.1) for index in range(6)]
    found = GridLosses('divergence', 8, 1.0, grids, 9)
    text = found.describe_worst(0.02)
    assert text is not None and text.startswith('grids that alone cost the outputs more than 0.02 before')
    assert text.endswith(
        ': activation relu 0.5, weight fc0 0.1, weight fc1 0.1, weight fc2 0.1, weight fc3 0.1 and 2 more'
    )
    assert found.describe_worst(0.2) is not None and str(found.describe_worst(0.2)).endswith(': activation relu 0.5')
    assert found.describe_worst(0.5) is None


def test_a_model_keeps_its_accuracy_and_its_file_what_is_float(tmp_path: Path) -> None:
    options = {'fallback': {'bound': 1e-3, 'limit': 0.5}, 'first_last_8bit': False}
    wanted = Net().eval()(images()).detach()
    errors = []
    for given in (options, {**options, 'fallback': {'limit': 0.0}}):
        quantized = mmbrecq.quantize(Net().eval(), images(), method='nearest', quantizer=given)
        errors.append(float((quantized(images()) - wanted).square().mean() / wanted.var(0).mean()))
        floats = {layer.name: layer.float_reason for layer in quantized.layers if layer.float_reason}
        assert list(floats) == (['second'] if given is options else [])
        assert all(reason.startswith('at 8 bits its input costs ') for reason in floats.values())
        quantized.export(tmp_path / 'model.xml', images())
        quantized.save(tmp_path / 'model.pth')
        found = mmbrecq.load(tmp_path / 'model.pth', Net().eval())(images())
        torch.testing.assert_close(found, quantized(images()), rtol=0, atol=0)
    assert errors[0] < 0.05 * errors[1]


def test_a_config_that_does_not_name_what_is_float_fits_the_file(tmp_path: Path) -> None:
    options = {'fallback': {'bound': 1e-3, 'limit': 0.5}}
    quantized = mmbrecq.quantize(Net().eval(), images(), method='nearest', quantizer=options)
    quantized.save(tmp_path / 'model.pth')
    given = {key: value for key, value in quantized.quantizer.items() if key != 'overrides'}
    loaded = pipeline.load(Net().eval(), tmp_path / 'model.pth', given)
    torch.testing.assert_close(loaded(images()), quantized(images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'bound': -1}, r'^expected quantizer\.fallback\.bound to be a number in \[0, inf\], but got -1$'),
        ({'limit': 2}, r'^expected quantizer\.fallback\.limit to be a number in \[0, 1\], but got 2$'),
        ({'images': True}, r'^expected quantizer\.fallback\.images to be an integer >= 1, but got True$'),
        (
            {'layers': 3},
            "^unknown option 'layers' of quantizer.fallback: expected bound or limit or low_bound or low_limit or ",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BRECQQuantizer({'bits': 8}, {'bits': 8}, fallback=options)
