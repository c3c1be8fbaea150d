from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import Apply, classifier, conv, images, net, packed, run
from torch import Tensor, nn

from mmbrecq.errors import ConfigError
from mmbrecq.graph.blocks import find_blocks
from mmbrecq.graph.traced_graph import TracedGraph, trace_image_graph
from mmbrecq.graph.units import GRANULARITIES, ReconstructionUnit, cut_units, is_below


def layers_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def cut(
    model: nn.Module, granularity: str, blocks: Sequence[str] | None = None
) -> tuple[list[ReconstructionUnit], TracedGraph]:
    traced = trace_image_graph(model, images(2))
    found = find_blocks(model, traced.graph, blocks)
    return cut_units(model, traced.graph, layers_of(model), set(), found, '', granularity), traced


def run_units(units: list[ReconstructionUnit], x: Tensor) -> dict[str, Tensor]:
    """All values that cross from unit to unit."""
    values = {'inputs': x}
    for unit in units:
        found = run(unit.module, *(values[name] for name in unit.inputs))
        assert isinstance(found, tuple) and len(found) == len(unit.outputs)
        assert not values.keys() & set(unit.outputs)
        values.update(zip(unit.outputs, found, strict=True))
    return values


def outputs_of(traced: TracedGraph) -> list[str]:
    return [n.name for n in next(n for n in traced.graph.nodes if n.op == 'output').all_input_nodes]


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('name', ['resnet', 'mobilenetv2', 'regnet', 'vgg'])
def test_units_in_order_compute_the_network(name: str, granularity: str) -> None:
    model, x = classifier(name), images(5, seed=1)
    units, traced = cut(model, granularity)
    (output,) = outputs_of(traced)
    torch.testing.assert_close(run_units(units, x)[output], run(traced.compile(), x), rtol=0, atol=0)
    assert Counter(layer for unit in units for layer in unit.layers) == Counter(layers_of(model))
    assert len({unit.name for unit in units}) == len(units)


def names(units: list[ReconstructionUnit]) -> list[str]:
    return [unit.name for unit in units]


def test_names_at_every_granularity() -> None:
    blocks = [f'backbone.layer{i}.{j}' for i in range(1, 5) for j in range(2)]
    found = {granularity: cut(classifier('resnet'), granularity)[0] for granularity in GRANULARITIES}
    assert names(found['block']) == ['backbone.conv1', *blocks, 'head.fc']
    assert names(found['stage']) == ['backbone.conv1', *(f'backbone.layer{i}' for i in range(1, 5)), 'head.fc']
    assert names(found['net']) == ['net0']
    assert names(found['layer']) == [unit.layers[0] for unit in found['layer']]
    assert all(len(unit.layers) == 1 for unit in found['layer'])
    assert len(found['layer']) == len(found['net'][0].layers) == 21
    second = next(unit for unit in found['block'] if unit.name == 'backbone.layer2.0')
    assert second.layers == tuple(f'backbone.layer2.0.{name}' for name in ('conv1', 'conv2', 'downsample.0'))


def test_layer_unit_takes_what_follows_the_layer() -> None:
    model = net(
        lambda self, x: self.last(self.pool(self.relu(self.first(x)))),
        first=conv(), relu=nn.ReLU(), pool=nn.MaxPool2d(2), last=conv(4, 2),
    )  # fmt: skip
    units, _ = cut(model, 'layer')
    calls = [[str(n.target) for n in unit.module.graph.nodes if n.op == 'call_module'] for unit in units]
    assert calls == [['backbone.first', 'backbone.relu', 'backbone.pool'], ['backbone.last']]


def pyramid(shared: bool) -> nn.Module:
    """Two levels: a bottom-up path, a top-down sum, and a head per level or one head for both."""

    def bottom_up(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.fine(x))
        return fine, F.relu(self.coarse(fine))

    def top_down(self: Any, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        fine, coarse = features
        coarse = self.lateral_coarse(coarse)
        size = fine.shape[-2:]
        return self.lateral_fine(fine) + F.interpolate(coarse, size=(int(size[0]), int(size[1]))), coarse

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = self.neck(self.body(x))
        return self.head(fine), (self.head if shared else self.other)(coarse)

    body = Apply(bottom_up, fine=conv(), coarse=nn.Conv2d(4, 6, 3, stride=2, padding=1))
    neck = Apply(top_down, lateral_fine=conv(4, 5, 1), lateral_coarse=conv(6, 5, 1))
    return net(forward, body=body, neck=neck, head=conv(5, 2), other=conv(5, 2))


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_several_inputs_and_outputs(granularity: str, shared: bool) -> None:
    model, x = pyramid(shared), images(3, seed=1)
    units, traced = cut(model, granularity, ['backbone.body', 'backbone.neck', 'backbone.head'])
    values = run_units(units, x)
    for name, wanted in zip(outputs_of(traced), run(traced.compile(), x), strict=True):
        torch.testing.assert_close(values[name], wanted, rtol=0, atol=0)
    if granularity == 'block':
        body, neck, *_ = units
        assert (len(body.inputs), len(body.outputs)) == (1, 2)
        assert (len(neck.inputs), len(neck.outputs)) == (2, 2)
        assert set(neck.inputs) == set(body.outputs)


def test_shared_head_is_one_unit_with_an_input_per_level() -> None:
    units, traced = cut(pyramid(shared=True), 'block', ['backbone.body', 'backbone.neck'])
    head = units[-1]
    assert head.name == 'backbone.head' and head.layers == ('backbone.head',)
    assert len(head.inputs) == 2 and set(head.inputs) == set(units[1].outputs)
    assert list(head.outputs) == outputs_of(traced)


def test_what_lies_between_two_calls_of_a_layer_joins_its_unit() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.shared(F.relu(self.stem(x))))
        return self.last(F.relu(self.shared(F.relu(self.middle(x)))))

    model = net(forward, stem=conv(), shared=conv(4, 4), middle=conv(4, 4), last=conv(4, 2))
    units, traced = cut(model, 'layer')
    assert [set(unit.layers) for unit in units] == [
        {'backbone.stem'}, {'backbone.shared', 'backbone.middle'}, {'backbone.last'}
    ]  # fmt: skip
    x = images(3, seed=1)
    torch.testing.assert_close(run_units(units, x)[outputs_of(traced)[0]], run(traced.compile(), x), rtol=0, atol=0)


def test_only_tensors_cross_from_unit_to_unit() -> None:
    """Sizes and tuples that another unit made are computed again, for the batch at hand."""

    def forward(self: Any, x: Tensor) -> Tensor:
        batch = x.size(0)
        first, second = self.stem(x).chunk(2, dim=1)
        y = self.left(first)
        z = self.right(second)
        return self.fc((y + z).view(batch, -1))

    model = net(forward, stem=conv(3, 4), left=conv(2, 2), right=conv(2, 2), fc=nn.Linear(2 * 32 * 32, 3))
    units, traced = cut(model, 'layer')
    values = run_units(units, images(5, seed=1))
    assert all(isinstance(value, Tensor) for value in values.values())
    torch.testing.assert_close(
        values[outputs_of(traced)[0]], run(traced.compile(), images(5, seed=1)), rtol=0, atol=0
    )  # fmt: skip


def test_values_without_images_along_their_first_axis_cross_no_unit() -> None:
    """Windows and stacked layers stay within a unit; the sizes of maps are computed again."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        sizes = torch._shape_as_tensor(x)[2:]
        windows = self.first(x.reshape(-1, 4, 4, 4)) + self.second(x.reshape(-1, 4, 4, 4))
        x = self.third(windows.reshape(x.shape[0], 4, *x.shape[2:]))
        return self.last(x) / sizes.prod()

    layers = {'first': conv(4, 4), 'second': conv(4, 4), 'third': conv(4, 4), 'last': conv(4, 2)}
    model, x = net(forward, stem=conv(), **layers), images(3, seed=1, size=8)
    traced = trace_image_graph(model, images(2, size=8))
    units = cut_units(model, traced.graph, layers_of(model), set(), [], '', 'layer')
    assert [len(unit.layers) for unit in units] == [3, 1, 1]
    values = run_units(units, x)
    assert all(len(value) == 3 for value in values.values())
    torch.testing.assert_close(values[outputs_of(traced)[0]], run(traced.compile(), x), rtol=0, atol=0)


def test_units_hold_the_quantizers_of_what_they_compute() -> None:
    model = packed(classifier('resnet'), 'onnxruntime')
    held = Counter(name for unit in model.image_graph.units for name in unit.quantizers)
    assert held == Counter(model.image_graph.quantizers.keys())
    x = images(3, seed=1)
    (output,) = outputs_of(model.image_graph.traced)
    torch.testing.assert_close(run_units(model.image_graph.units, x)[output], run(model, x), rtol=0, atol=0)


def test_unknown_granularity() -> None:
    message = r"expected granularity to be one of \['layer', 'block', 'stage', 'net'\], but got 'model'"
    with pytest.raises(ConfigError, match=message):
        cut(classifier('resnet'), 'model')


@pytest.mark.parametrize(
    ('path', 'ancestor', 'expected'),
    [('a.b', 'a', True), ('a', 'a', True), ('ab', 'a', False), ('a', 'a.b', False), ('a.bc.d', 'a.b', False)],
)
def test_is_below(path: str, ancestor: str, expected: bool) -> None:
    assert is_below(path, ancestor) == expected
