from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import classifier, conv, images, net, relative_error, run
from torch import Tensor, nn

from mmbrecq.graph.components import attach, components_of
from mmbrecq.graph.traced_graph import evaluation_mode, trace_image_graph


@pytest.mark.parametrize('name', ['resnet', 'mobilenetv2', 'regnet', 'vgg'])
def test_plugged_graph_gives_the_float_predictions(name: str) -> None:
    model, x = classifier(name), images(3, seed=1)
    raw = run(lambda v: model(v, mode='tensor'), x)
    scores = torch.stack([sample.pred_score for sample in run(model.predict, x)])
    traced = trace_image_graph(model, images(2))
    attach(model, traced.compile())
    plugged = run(lambda v: model(v, mode='tensor'), x)
    assert relative_error(plugged, raw) < 1e-5
    found = torch.stack([sample.pred_score for sample in run(model.predict, x)])
    torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-7)


def test_whatever_is_plugged_in_feeds_the_post_processing() -> None:
    """So a deployed file is evaluated by the model's own ``predict``."""
    model = classifier('resnet')
    logits = torch.tensor([[0.0] * 9 + [5.0], [3.0] + [0.0] * 9])
    seen: list[Tensor] = []

    def arithmetic(inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return logits

    attach(model, arithmetic)
    x = images(2)
    samples = run(model.predict, x)
    assert len(seen) == 1 and seen[0] is x
    assert [int(sample.pred_label) for sample in samples] == [9, 0]
    torch.testing.assert_close(torch.stack([s.pred_score for s in samples]), logits.softmax(1))


def test_plugging_leaves_modules_and_state_alone() -> None:
    model = classifier('resnet')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    attach(model, lambda x: x)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_components_in_the_order_in_which_they_run() -> None:
    model = classifier('resnet')
    assert components_of(model) == [model.backbone, model.neck, model.head]
    alone = net(lambda self, x: self.conv(x), conv=conv())
    assert components_of(alone) == [alone.backbone]


@pytest.mark.parametrize('training', [False, True])
def test_evaluation_mode_is_put_back(training: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5)).train(training)

    def observe() -> Any:
        return model.training, model[0].training, torch.is_grad_enabled()

    with evaluation_mode(model):
        assert observe() == (False, False, False)
    assert observe() == (training, training, True)
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        raise KeyboardInterrupt
    assert observe() == (training, training, True)


def test_tracing_puts_the_model_into_evaluation_mode() -> None:
    model = net(lambda self, x: self.drop(self.conv(x)), conv=conv(), drop=nn.Dropout(0.9)).train()
    traced = trace_image_graph(model, images(2)).compile()
    assert not model.training
    torch.testing.assert_close(run(traced, images()), run(model, images()))
