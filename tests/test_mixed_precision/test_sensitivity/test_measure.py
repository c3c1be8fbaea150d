"""The loss of single layers against NumPy on the outputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import classifier, conv, images, net, prepare
from torch import Tensor
from torch.nn import functional as F

from mmbrecq.calibration.calibrator import calibrate_weights
from mmbrecq.mixed_precision.sensitivity.measure import FISHER, OutputLoss, squared_gradients
from mmbrecq.quantizers.quantized_model import QuantizedModel


def calibrated(model: QuantizedModel) -> QuantizedModel:
    calibrate_weights(model)
    return model


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_classes_are_compared_by_their_divergence() -> None:
    model, batch = calibrated(prepare(classifier('resnet'), 'academic')), images(70)
    loss = OutputLoss(model.image_graph, batch)
    assert loss.kind == 'divergence'
    wanted = log_softmax(model(batch).numpy().astype(np.float64))
    for layers in ({'backbone.layer1.0.conv1'}, {'backbone.layer1.0.conv1', 'backbone.layer4.1.conv2'}):
        with model.image_graph.quantization(layers, activations=False):
            found = log_softmax(model(batch).numpy().astype(np.float64))
        expected = (np.exp(wanted) * (wanted - found)).sum(1).mean()
        np.testing.assert_allclose(loss.of(layers), expected, rtol=1e-4)
        assert expected > 0
    assert loss.of(set()) == 0


def test_maps_are_compared_by_their_errors_over_their_power() -> None:
    def forward(own: object, x: Tensor) -> tuple[Tensor, Tensor]:
        y = own.first(x)  # type: ignore[attr-defined]
        return own.second(y), 100 * own.third(y)  # type: ignore[attr-defined]

    model = calibrated(prepare(net(forward, first=conv(), second=conv(4, 2), third=conv(4, 3)), 'academic'))
    batch = images(70)
    loss = OutputLoss(model.image_graph, batch)
    assert loss.kind == 'distance'
    wanted = [output.numpy().astype(np.float64) for output in model(batch)]
    with model.image_graph.quantization({'backbone.first'}, activations=False):
        found = [output.numpy().astype(np.float64) for output in model(batch)]
    expected = sum(((f - w) ** 2).sum() / (w**2).sum() for f, w in zip(found, wanted, strict=True))
    np.testing.assert_allclose(loss.of({'backbone.first'}), expected, rtol=1e-4)


@pytest.mark.parametrize('count', [70, 67])
def test_annotations_weigh_the_errors(count: int) -> None:
    """The gradient of the cross-entropy at the scores is the probabilities less the label's one."""
    model, batch = calibrated(prepare(classifier('resnet'), 'academic')), images(count)
    scores = model(batch).numpy().astype(np.float64)
    labels = np.arange(70) % scores.shape[1]
    batches = [{'inputs': range(i, i + 10), 'data_samples': list(range(i, i + 10))} for i in range(0, 70, 10)]

    def task_loss(data: dict[str, list[int]], x: Tensor) -> Tensor:
        assert len(x) == len(data['data_samples']) == len(data['inputs'])
        return F.cross_entropy(model.model(x, mode='tensor'), torch.from_numpy(labels[data['data_samples']]))

    squares = squared_gradients(model, batches, batch, task_loss)
    gradient = np.exp(log_softmax(scores)) - np.eye(scores.shape[1])[labels[:count]]
    np.testing.assert_allclose(squares[0].numpy(), gradient**2, rtol=1e-3, atol=1e-7)
    assert not any(parameter.grad is not None for parameter in model.model.parameters())

    loss = OutputLoss(model.image_graph, batch, squares)
    with model.image_graph.quantization({'backbone.layer1.0.conv1'}, activations=False):
        error = model(batch).numpy().astype(np.float64) - scores
    expected = 0.5 * (gradient**2 * error**2).sum(1).mean()
    np.testing.assert_allclose(loss.of({'backbone.layer1.0.conv1'}), expected, rtol=1e-3)
    assert loss.kind == FISHER


@pytest.mark.parametrize('fisher', [False, True])
def test_a_process_without_images_adds_nothing(fisher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    where = 'mmbrecq.mixed_precision.sensitivity.measure.mean_over'
    monkeypatch.setattr(where, lambda *share: shares.append(share) or 0.0)
    model = calibrated(prepare(classifier('resnet'), 'academic'))
    none = images(1)[:0]
    squares = squared_gradients(model, [], none, lambda *_: torch.zeros(())) if fisher else None
    loss = OutputLoss(model.image_graph, none, squares)
    assert loss.kind == (FISHER if fisher else 'divergence')
    loss.of({'backbone.conv1'})
    assert shares == [(0, 0)]


def test_only_the_named_layers_are_quantized_and_only_within_the_block() -> None:
    model = calibrated(prepare(classifier('resnet'), 'academic'))
    with model.image_graph.quantization({'head.fc'}, activations=False):
        enabled = {name for name, _, fake_quant in model.weights() if fake_quant.enabled}
        assert not any(quantizer.enabled for quantizer in model.image_graph.quantizers.values())
    assert enabled == {'head.fc'}
    assert not any(fake_quant.enabled for _, _, fake_quant in model.weights())


@pytest.mark.parametrize('count', [1, 64, 65])
def test_the_last_images_count(count: int) -> None:
    model, batch = calibrated(prepare(classifier('resnet'), 'academic')), images(count)
    single = [OutputLoss(model.image_graph, image[None]).of({'backbone.conv1'}) for image in batch]
    np.testing.assert_allclose(OutputLoss(model.image_graph, batch).of({'backbone.conv1'}), np.mean(single), rtol=1e-3)
