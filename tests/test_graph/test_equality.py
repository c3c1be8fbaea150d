from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import classifier, conv, images, net, run
from torch import Tensor, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.equality import check_equality, full_float32, output_error, take_reference
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.traced_graph import trace_image_graph


def test_a_prepared_graph_equals_its_model() -> None:
    model = classifier('mobilenetv2')
    reference = take_reference(model, images(2))
    assert [tuple(batch.shape) for batch in reference.batches] == [(1, 3, 32, 32), (3, 3, 32, 32), (1, 3, 128, 96)]
    traced = trace_image_graph(model, images(2))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for batch, wanted in zip(reference.batches, reference.outputs, strict=True):
        found = flatten_outputs(run(traced.compile(), batch))
        assert max(output_error(found[name], value) for name, value in wanted.items()) < 1e-8
    check_equality(traced.compile(), reference)


def test_the_reference_is_taken_before_the_model_changes() -> None:
    model = net(lambda self, x: self.conv(x), conv=conv())
    before = run(model, images(2))
    reference = take_reference(model, images(2))
    with torch.no_grad():
        model.backbone.conv.weight.zero_()
    torch.testing.assert_close(reference.outputs[1]['output'][:2], before, rtol=1e-5, atol=1e-6)


def _chain(self: Any, x: Tensor) -> Tensor:
    return self.last(self.act(self.middle(self.first(x))))


def test_the_first_layer_that_differs_is_named() -> None:
    model = net(_chain, first=conv(), middle=conv(4, 4), act=nn.ReLU(), last=conv(4, 2))
    reference = take_reference(model, images(2))
    traced = trace_image_graph(model, images(2))
    with torch.no_grad():
        model.backbone.middle.weight *= 1.5
    with pytest.raises(
        GraphError,
        match=r'compute what Net does, but for images of 1 x 3 x 32 x 32 it is off by .* of the variance of its '
        r'outputs, first after backbone.middle, in what backbone.act reads$',
    ):
        check_equality(traced.compile(), reference)


def test_another_course_for_one_image_is_found() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * 2.0 if x.shape[0] > 1 else y)

    model = net(forward, first=conv(), last=conv(4, 2))
    reference = take_reference(model, images(2))
    traced = trace_image_graph(model, images(2))
    with pytest.raises(GraphError, match='for images of 1 x 3 x 32 x 32 .* in what backbone.last reads'):
        check_equality(traced.compile(), reference)


def test_another_height_and_width_counts_where_it_is_free() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x) * (1.0 if x.shape[3] == 32 else 2.0)

    model = net(forward, conv=conv())
    reference = take_reference(model, images(2))
    traced = trace_image_graph(model, images(2))
    assert not traced.free_size
    check_equality(traced.compile(), reference, traced.free_size)
    traced.frozen = []
    with pytest.raises(GraphError, match='for images of 1 x 3 x 128 x 96'):
        check_equality(traced.compile(), reference, traced.free_size)


def test_a_squeeze_that_drops_the_only_image_is_told_by_its_shapes() -> None:
    model = net(lambda self, x: self.fc(self.conv(x).mean((2, 3)).squeeze()), conv=conv(), fc=nn.Linear(4, 2))
    reference = take_reference(model, images(2))
    traced = trace_image_graph(model, images(2))
    with pytest.raises(
        GraphError, match=r'1 x 3 x 32 x 32 its outputs have the shapes output \(1, 2\) instead of output \(2,\)'
    ):
        check_equality(traced.compile(), reference)


@pytest.mark.parametrize(('gain', 'passes'), [(1.0, False), (3e3, True), (1e6, False)])
def test_what_a_model_makes_of_its_own_rounding_is_allowed(gain: float, passes: bool) -> None:
    """A function amplifies differences of float32; another weight is too much where it does not, or too far."""
    model = net(lambda self, x: self.last(torch.sin(gain * self.conv(x))), conv=conv(), last=conv(4, 2))
    reference = take_reference(model, images(2))
    traced = trace_image_graph(model, images(2))
    with torch.no_grad():
        model.backbone.conv.weight *= 1 + (5e-3 if gain == 1 else 3e-6)
    if passes:
        assert output_error(traced.compile()(reference.batches[1]), reference.outputs[1]['output']) > 1e-5
        check_equality(traced.compile(), reference)
        return
    remark = '; noise of 3e-06 on the images changes them by .*, so that nothing can be compared' if gain > 1 else ''
    with pytest.raises(GraphError, match=rf'off by \S+ of the variance of its outputs{remark}, first after'):
        check_equality(traced.compile(), reference)


def _counting(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.conv(x) * (2.0 if self.calls > self.bound else 1.0)


@pytest.mark.parametrize(('bound', 'by_hand'), [(3, 'calls'), (10**5, 'calls'), (10**7, ''), (float('inf'), '')])
def test_a_count_may_not_change_the_outputs(bound: float, by_hand: str) -> None:
    model = net(_counting, conv=conv())
    model.backbone.bound = bound
    model.backbone.register_buffer('calls', torch.zeros((), dtype=torch.int64))
    if not by_hand:
        take_reference(model, images(2))
        assert 0 < model.backbone.calls < 10
        return
    with pytest.raises(GraphError, match='in another pass it is off by .* it computes with backbone.calls, which it'):
        take_reference(model, images(2))


def test_a_table_that_follows_the_size_of_the_images_is_no_state() -> None:
    def scale_columns(self: Any, x: Tensor) -> Tensor:
        if len(self.columns) != x.shape[-1]:
            self.columns = torch.linspace(1, 2, x.shape[-1])
        return self.conv(x * self.columns)

    model = net(scale_columns, conv=conv())
    model.backbone.register_buffer('columns', torch.ones(0))
    reference = take_reference(model, images(2))
    assert len(reference.outputs) == 3 and model.backbone.columns.shape == (32,)


def test_outputs_that_are_drawn_are_refused() -> None:
    model = net(lambda self, x: self.last(self.conv(x) * torch.rand(1)), conv=conv(), last=conv(4, 2))
    with pytest.raises(GraphError, match='another pass .* in what backbone.last reads: it draws random numbers or'):
        take_reference(model, images(2))


def test_weights_that_a_pass_changes_are_named() -> None:
    def initialise(self: Any, x: Tensor) -> Tensor:
        if not self.conv.bias.any():
            # torch counts no write by `.data`
            self.conv.bias.data.fill_(float(x.mean()))
        return self.conv(x)

    model = net(initialise, conv=conv())
    nn.init.zeros_(model.backbone.conv.bias)
    with pytest.raises(GraphError, match='forward pass that keeps all weights, but it changes backbone.conv.bias$'):
        take_reference(model, images(2))


def test_full_float32_is_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    with full_float32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
