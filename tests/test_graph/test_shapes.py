from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import classifier, conv, images, net, run
from torch import Tensor, fx, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph import traced_graph
from mmbrecq.graph.equality import check_equality, take_reference
from mmbrecq.graph.shapes import call_with, note_shapes, shapes_of, stand_in, state_on
from mmbrecq.graph.traced_graph import smaller, trace_image_graph
from mmbrecq.quantizers import BRECQQuantizer


@pytest.fixture
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_graph, 'LARGE', 200**2)


def shapes(graph: fx.Graph) -> dict[str, Any]:
    return {n.name: shapes_of(n.meta['example']) for n in graph.nodes if 'example' in n.meta}


def test_a_corner_keeps_what_is_left_of_strides() -> None:
    assert smaller(torch.zeros(2, 3, 1344, 800)).shape == (2, 3, 192, 288)
    assert smaller(torch.zeros(2, 3, 1344, 800), 320).shape == (2, 3, 320, 416)
    assert smaller(torch.zeros(1, 3, 100, 4000)).shape == (1, 3, 100, 288)
    small, features = torch.zeros(2, 3, 512, 512), torch.zeros(2, 10**6)
    assert smaller(small) is small and smaller(features) is features


@pytest.mark.usefixtures('_small_is_large')
def test_shapes_are_those_of_the_large_images() -> None:
    """Each is compared with that of a trace of the images as they are."""
    traced = trace_image_graph(classifier('mobilenetv2'), images(2, size=224))
    assert traced.example.shape == (2, 3, 224, 224)
    corner = trace_image_graph(classifier('mobilenetv2'), images(2, size=224))
    corner.keep_shapes(images(2, size=224))
    for name, value in shapes(traced.graph).items():
        found = shapes(corner.graph)[name]
        assert getattr(found, 'shape', found) == getattr(value, 'shape', value), name


def test_an_operation_without_shapes_alone_is_run() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, : int(x.isnan().sum()) + 5]

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Counting())
    graph = fx.Graph()
    node = graph.placeholder('x')
    for path in ('0', '1'):
        node = graph.call_module(path, (node,))
    graph.output(node)
    note_shapes(model, graph, images(2, size=8))
    assert node.meta['example'].device.type == 'meta' and node.meta['example'].shape == (2, 4, 5, 8)
    with pytest.raises(GraphError, match='the graph of Sequential does not run on images of 2 x 4 x 8 x 8: '):
        note_shapes(model, graph, torch.zeros(2, 4, 8, 8))


def test_shared_modules_and_weights_are_given_back() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            # one module at two paths, and one weight of two modules
            self.second, self.third = self.first, nn.Linear(4, 4)
            self.third.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    model = Shared()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert call_with(model, state_on(model, 'meta'), torch.empty(2, 4, device='meta')).device.type == 'meta'
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.first is model.second and model.third.weight is model.first.weight
    x = torch.randn(2, 4)
    torch.testing.assert_close(call_with(model, state_on(model, 'cpu'), x), model(x))


def test_what_stands_in_for_values() -> None:
    known = torch.arange(3.0)
    assert torch.equal(stand_in(known, 'cpu'), known)
    assert stand_in(known, 'meta').device.type == 'meta'
    drawn = stand_in(torch.empty(1000, device='meta'), 'cpu')
    assert 0 <= float(drawn.min()) < 0.1 and 0.9 < float(drawn.max()) < 1
    assert not stand_in(torch.empty(3, dtype=torch.bool, device='meta'), 'cpu').any()


@pytest.mark.usefixtures('_small_is_large')
@pytest.mark.parametrize('name', ['resnet', 'regnet'])
def test_a_corner_gives_the_graph_of_large_images(name: str) -> None:
    model, x = classifier(name), images(2, size=256)
    reference = take_reference(model, x)
    assert [tuple(batch.shape[::2]) for batch in reference.batches] == [(1, 256), (3, 256), (1, 448)]
    monitored: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, args: monitored.append(args[0]))
    traced = trace_image_graph(model, images(2, size=320))
    assert traced.free_size and {tensor.shape[-1] for tensor in monitored} <= {192, 192 + 128}
    check_equality(traced.compile(), reference, traced.free_size)
    wanted = reference.outputs[0]['output']
    torch.testing.assert_close(run(traced.compile(), x)[:1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures('_small_is_large')
def test_a_model_of_one_size_is_traced_as_it_is() -> None:
    model = net(lambda self, x: self.fc(self.conv(x).flatten(1)), conv=conv(), fc=nn.Linear(4 * 256 * 256, 2))
    x = images(2, size=256)
    reference = take_reference(model, x)
    assert [tuple(batch.shape[::2]) for batch in reference.batches] == [(1, 256), (3, 256), (1, 448)]
    traced = trace_image_graph(model, x)
    assert not traced.free_size and traced.example.shape == (2, 3, 256, 256)
    check_equality(traced.compile(), reference, traced.free_size)


@pytest.mark.usefixtures('_small_is_large')
def test_a_size_that_only_large_images_reach_is_found() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * 2.0 if x.shape[2] > 600 else y)

    model, x = net(forward, first=conv(), last=conv(4, 2)), images(2, size=640)
    reference = take_reference(model, x)
    traced = trace_image_graph(model, x)
    assert traced.free_size
    with pytest.raises(GraphError, match='for images of 1 x 3 x 640 x 640 it is off .* in what backbone.last reads'):
        check_equality(traced.compile(), reference, traced.free_size)


@pytest.mark.usefixtures('_small_is_large')
def test_a_quantized_model_keeps_no_values() -> None:
    x = images(2, size=256)
    model = BRECQQuantizer({'bits': 8}, {'bits': 8}).prepare(classifier('resnet'), x)
    traced = model.image_graph.traced
    assert traced.example.shape == x.shape and torch.equal(traced.example, x)
    kept = [n.meta['example'] for n in traced.graph.nodes if isinstance(n.meta.get('example'), Tensor)]
    assert sum(value.device.type != 'meta' for value in kept) == 1
    assert max(value.shape[-1] for value in kept) == 256
