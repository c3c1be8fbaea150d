from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Apply, Net, classifier, conv, images, net, residual, run
from torch import Tensor, fx, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.components import ImageForward
from mmbrecq.graph.traced_graph import trace_image_graph
from mmbrecq.graph.tracer import ConcreteTracer


def trace(model: nn.Module, example: Tensor | None = None) -> tuple[fx.GraphModule, ConcreteTracer]:
    tracer = ConcreteTracer(images(2) if example is None else example)
    return fx.GraphModule(model, tracer.trace_model(model, ImageForward(model))), tracer


def _flatten_by_size(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.fc(y.view(y.size(0), -1))


def _flatten_by_shape(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    batch, *_ = y.shape
    return self.fc(y.reshape(batch, -1))


def _new_tensor_of_batch(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.fc((y + torch.zeros(y.shape[0], 1, 1, 1)).flatten(1))


@pytest.mark.parametrize('function', [_flatten_by_size, _flatten_by_shape, _new_tensor_of_batch])
def test_batch_size_stays_symbolic(function: Any) -> None:
    model = net(function, conv=conv(), fc=nn.Linear(4 * 64, 5))
    traced, _ = trace(model, images(2, size=8))
    for count in (1, 5):
        x = images(count, seed=1, size=8)
        torch.testing.assert_close(run(traced, x), run(model, x), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['resnet', 'mobilenetv2', 'regnet', 'vgg'])
def test_classifiers_trace_without_opaque_modules(name: str) -> None:
    model = classifier(name)
    traced, tracer = trace(model)
    x = images(3, seed=1)
    assert tracer.opaque == {}
    torch.testing.assert_close(run(traced, x), run(lambda v: model(v, mode='tensor'), x), rtol=0, atol=0)


def test_tests_on_shapes_resolve() -> None:
    """Size tests in Python: the kind of padding and looping that plain ``torch.fx`` refuses."""

    def forward(self: Any, x: Tensor) -> Tensor:
        height = int(x.shape[-2])
        if height % 16 != 0 and x.shape[-1] > 3:
            x = torch.nn.functional.pad(x, (0, 0, 0, 16 - height % 16))
        x = self.conv(x)
        if len(x) > 1 and x.numel() > 0:
            x = x * 2.0
        for _ in range(x.size(1) // 2):
            x = x + 1.0
        return x

    model = net(forward, conv=conv())
    with pytest.raises(Exception, match='control flow|Proxy|interpret'):
        fx.symbolic_trace(model.backbone)
    traced, tracer = trace(model, images(2, size=10))
    assert tracer.opaque == {}
    x = images(3, seed=1, size=10)
    assert run(traced, x).shape[-2] == 16
    torch.testing.assert_close(run(traced, x), run(model, x), rtol=0, atol=0)


def test_tuples_are_unpacked_and_iterated() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = self.conv(x).chunk(2, dim=1)
        return torch.cat([part * 2 for part in (first + second).split(1, dim=1)], dim=1)

    model = net(forward, conv=conv())
    traced, _ = trace(model)
    torch.testing.assert_close(run(traced, images()), run(model, images()), rtol=0, atol=0)


class _Branches(nn.Module):
    """Has another course for each image, which no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.mean() > 0 else -y


def test_module_that_cannot_be_traced_is_one_opaque_call() -> None:
    model = net(lambda self, x: self.last(self.odd(self.first(x))), first=conv(), odd=_Branches(), last=conv(4, 2))
    traced, tracer = trace(model)
    assert list(tracer.opaque) == ['backbone.odd'] and tracer.value_dependent == {'backbone.odd'}
    assert re.match(
        r'_Branches cannot be traced: test_tracer.py:\d+: .* a branch follows', tracer.opaque['backbone.odd']
    )
    calls = [(n.op, n.target) for n in traced.graph.nodes if n.op not in ('placeholder', 'output')]
    assert calls == [('call_module', f'backbone.{name}') for name in ('first', 'odd', 'last')]
    x = images(5, seed=1)
    torch.testing.assert_close(run(traced, x), run(model, x), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore:To copy construct')
@pytest.mark.parametrize(
    'converted',
    [
        lambda y: (y > 0).type(torch.int64),
        lambda y: torch.full_like(y, y.amax()),
        lambda y: y.new_full((2,), y[0, 0, 0, 0]),
        lambda y: y.new_tensor(y.mean()),
    ],
)
def test_a_tensor_filled_or_converted_from_values_follows_from_them(converted: Callable[[Tensor], Tensor]) -> None:
    class Counts(_Branches):
        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y * int(converted(y).sum())

    model = net(lambda self, x: self.odd(self.first(x)), first=conv(), odd=Counts())
    tracer = trace(model)[1]
    assert list(tracer.opaque) == ['backbone.odd'] and tracer.value_dependent == {'backbone.odd'}


def test_a_type_and_what_is_like_a_tensor_follow_from_no_values() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.zeros_like(y).add(y) if y.type() == 'torch.FloatTensor' else y.new_full((1,), 2.0)

    assert not trace(net(forward, conv=conv()))[1].opaque


def test_tensors_of_an_opaque_module_are_nodes_of_their_own() -> None:
    class Pair(_Branches):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, [y + 1, y + 2]

    def forward(self: Any, x: Tensor) -> Tensor:
        first, (second, third) = self.odd(self.first(x))
        return self.last(first) + second[:, :2] * third[:, :2]

    model = net(forward, first=conv(), odd=Pair(), last=conv(4, 2))
    traced, tracer = trace(model)
    assert list(tracer.opaque) == ['backbone.odd']
    x = images(5, seed=1)
    torch.testing.assert_close(run(traced, x), run(model, x), rtol=0, atol=0)
    read = [n for n in traced.graph.nodes if str(n.target) == 'backbone.last' for n in n.all_input_nodes]
    assert all(isinstance(n.meta['example'], Tensor) for n in read)


def test_a_component_called_by_its_forward_is_recorded_as_a_call() -> None:
    """As mmdet's one-stage detectors write it; a component that cannot be traced is one call then, not an error."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.bbox_head = conv(), _Branches()

        def forward(self, inputs: Tensor, mode: str = 'tensor') -> Any:
            head: Any = self.bbox_head
            return head.forward(self.backbone(inputs))

    model = Detector().eval()
    x = images(5, seed=1)
    wanted = model(x)
    traced, tracer = trace(model)
    assert list(tracer.opaque) == ['bbox_head']
    torch.testing.assert_close(run(traced, x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)
    # in the place of the head runs the graph, and in the graph the head
    traced = trace_image_graph(model, images(2))
    traced.attach(traced.compile())
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)


def test_only_the_innermost_module_is_opaque() -> None:
    def outer(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.odd(x)) + x

    inner = Apply(outer, odd=_Branches(), relu=nn.ReLU())
    traced, tracer = trace(net(lambda self, x: self.outer(self.first(x)), first=conv(), outer=inner))
    assert list(tracer.opaque) == ['backbone.outer.odd']
    assert 'backbone.outer.relu' in {n.target for n in traced.graph.nodes}


def test_module_given_an_object_leaves_the_opacity_to_its_caller() -> None:
    """A call in the graph can only be given tensors and numbers."""

    class Options:
        factor = 2.0

    class Inner(nn.Module):
        def forward(self, x: Tensor, options: Options) -> Tensor:
            return x * options.factor if x.mean() > 0 else x

    outer = Apply(lambda self, x: self.inner(x, Options()), inner=Inner())
    model = net(lambda self, x: self.outer(self.first(x)), first=conv(), outer=outer)
    traced, tracer = trace(model)
    assert list(tracer.opaque) == ['backbone.outer']
    torch.testing.assert_close(run(traced, images()), run(model, images()), rtol=0, atol=0)


def test_model_that_cannot_be_traced_is_named() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, inputs: Tensor, mode: str) -> Tensor:
            y = self.conv(inputs)
            return y * float(y.mean())

    with pytest.raises(GraphError, match=r'^Whole cannot be traced: test_tracer.py:\d+: .* a number follows'):
        trace_image_graph(Whole(), images(2))


def test_subclass_of_a_convolution_is_a_leaf() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.pad(x, (0, 1, 0, 1)))

    model = net(lambda self, x: self.odd(x), odd=Padded(3, 4, 2))
    traced, _ = trace(model)
    assert [n.op for n in traced.graph.nodes] == ['placeholder', 'call_module', 'output']
    torch.testing.assert_close(run(traced, images()), run(model, images()), rtol=0, atol=0)


def test_nodes_know_their_value_and_their_owner() -> None:
    model, x = residual(), images(2)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out))
    run(model, x)
    traced, _ = trace(model, x)
    modules = [n for n in traced.graph.nodes if n.op == 'call_module']
    assert len(modules) == 9
    for node in modules:
        assert node.meta['owner'] == node.target
        torch.testing.assert_close(node.meta['example'], seen[node.target], rtol=0, atol=0)
    functions = [n for n in traced.graph.nodes if n.op == 'call_function']
    assert {n.meta['owner'] for n in functions} == {'backbone'}
    resnet, _ = trace(classifier('resnet'))
    owners = {n.meta['owner'] for n in resnet.graph.nodes if 'add' in n.name}
    assert owners == {f'backbone.layer{i}.{j}' for i in range(1, 5) for j in range(2)}


def test_parameters_read_by_a_module_stay_its_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    model = net(lambda self, x: self.scaled(self.conv(x)), conv=conv(), scaled=Scaled())
    traced, _ = trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == 'get_attr'] == ['backbone.scaled.gain']
    with torch.no_grad():
        model.backbone.scaled.gain.fill_(5.0)
    torch.testing.assert_close(run(traced, images()), run(model, images()), rtol=0, atol=0)
    assert isinstance(model, Net)


@pytest.mark.parametrize('shape', [(2, 5, 7), (2, 6, 4, 4), (2, 3, 2, 4, 4)])
@pytest.mark.parametrize('size', [1, 4, 5])
def test_norm_across_channels_is_that_of_torch(shape: tuple[int, ...], size: int) -> None:
    model = net(lambda self, x: self.norm(self.conv(x) * x), conv=nn.Identity(), norm=nn.LocalResponseNorm(size, 0.5))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    traced, _ = trace(model, x)
    assert not any(node.op == 'call_module' and 'norm' in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(run(traced, x), run(model, x))


@pytest.mark.parametrize(('dim', 'size', 'step'), [(2, 3, 2), (-1, 4, 4), (1, 1, 1)])
def test_windows_are_those_of_torch(dim: int, size: int, step: int) -> None:
    model = net(lambda self, x: self.conv(x).unfold(dim, size, step), conv=conv())
    traced, _ = trace(model)
    assert all(node.target != 'unfold' for node in traced.graph.nodes)
    torch.testing.assert_close(run(traced, images()), run(model, images()), rtol=0, atol=0)


def test_functions_of_autograd_are_entered_while_a_model_is_traced_alone() -> None:
    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
            assert ctx.needs_input_grad == (False, False)
            ctx.save_for_backward(x)
            return x.clamp(max=bound)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return gradient * 3, None

    traced, tracer = trace(net(lambda self, x: Clipped.apply(self.conv(x), 0.1), conv=conv()))
    assert not tracer.opaque and 'clamp' in {node.target for node in traced.graph.nodes}
    assert 'apply' not in vars(torch.autograd.Function.__base__)


def test_buffers_that_a_trace_writes_into_get_their_values_back() -> None:
    def count(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x)

    model = net(count, conv=conv())
    model.backbone.register_buffer('calls', torch.zeros(()))
    traced, _ = trace(model)
    assert not model.backbone.calls
    torch.testing.assert_close(run(traced, images()), run(model, images()), rtol=0, atol=0)
    assert model.backbone.calls == 1


def test_an_activation_function_with_a_forward_of_its_own_is_no_leaf() -> None:
    act = nn.ReLU()
    act.forward = lambda x: -x  # type: ignore[method-assign]
    traced, _ = trace(net(lambda self, x: self.act(self.conv(x)), conv=conv(), act=act))
    assert [n.target for n in traced.graph.nodes if n.op == 'call_module'] == ['backbone.conv']
