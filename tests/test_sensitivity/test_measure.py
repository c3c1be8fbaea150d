"""The loss of single layers against NumPy on the outputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import classifier, conv, images, net, prepare
from torch import Tensor

from mmbrecq.calibration.calibrator import calibrate_weights
from mmbrecq.quantizers.prepared import QuantizedModel
from mmbrecq.sensitivity.measure import OutputLoss, quantizing


def calibrated(model: QuantizedModel) -> QuantizedModel:
    calibrate_weights(model)
    return model


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_classes_are_compared_by_their_divergence() -> None:
    model, batch = calibrated(prepare(classifier('resnet'), 'academic')), images(70)
    loss = OutputLoss(model, batch)
    assert loss.kind == 'divergence'
    wanted = log_softmax(model(batch).numpy().astype(np.float64))
    for layers in ({'backbone.layer1.0.conv1'}, {'backbone.layer1.0.conv1', 'backbone.layer4.1.conv2'}):
        with quantizing(model, layers):
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
    loss = OutputLoss(model, batch)
    assert loss.kind == 'distance'
    wanted = [output.numpy().astype(np.float64) for output in model(batch)]
    with quantizing(model, {'backbone.first'}):
        found = [output.numpy().astype(np.float64) for output in model(batch)]
    expected = sum(((f - w) ** 2).sum() / (w**2).sum() for f, w in zip(found, wanted, strict=True))
    np.testing.assert_allclose(loss.of({'backbone.first'}), expected, rtol=1e-4)


def test_only_the_named_layers_are_quantized_and_only_within_the_block() -> None:
    model = calibrated(prepare(classifier('resnet'), 'academic'))
    with quantizing(model, {'head.fc'}):
        enabled = {name for name, _, fake_quant in model.weights() if fake_quant.enabled}
        assert not any(quantizer.enabled for quantizer in model.quantizers.values())
    assert enabled == {'head.fc'}
    assert not any(fake_quant.enabled for _, _, fake_quant in model.weights())


@pytest.mark.parametrize('count', [1, 64, 65])
def test_the_last_images_count(count: int) -> None:
    model, batch = calibrated(prepare(classifier('resnet'), 'academic')), images(count)
    single = [OutputLoss(model, image[None]).of({'backbone.conv1'}) for image in batch]
    np.testing.assert_allclose(OutputLoss(model, batch).of({'backbone.conv1'}), np.mean(single), rtol=1e-3)
