from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmbrecq.errors import ConfigError, NonFiniteError
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, FisherLoss, MSELoss, Task
from mmbrecq.reconstruction.cache import ActivationCache, CachePlan
from mmbrecq.reconstruction.losses import FisherWeights, RelativeMSELoss, output_fisher, task_fisher
from mmbrecq.registry import LOSSES

SHAPES = pytest.mark.parametrize('shape', [(4, 3, 5, 2), (4, 3), (4, 3, 7)], ids=['map', 'vector', 'tokens'])


def arrays(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    fisher = rng.exponential(1, shape)
    return rng.normal(size=shape), rng.normal(size=shape), fisher / fisher.mean()


def test_both_are_registered() -> None:
    assert LOSSES.get('MSELoss') is MSELoss
    assert LOSSES.get('FisherLoss') is FisherLoss
    assert not MSELoss.needs_fisher
    assert FisherLoss.needs_fisher


@SHAPES
def test_mse_sums_channels_and_averages_the_rest(shape: tuple[int, ...]) -> None:
    output, target, _ = arrays(shape)
    expected = ((output - target) ** 2).sum() / (np.prod(shape) / shape[1])
    got = MSELoss()(torch.from_numpy(output), torch.from_numpy(target))
    assert got.shape == ()
    assert float(got) == pytest.approx(expected, rel=1e-12)


@SHAPES
def test_relative_mse_divides_every_position_by_its_power(shape: tuple[int, ...]) -> None:
    output, target, _ = arrays(shape)
    axis = -1 if len(shape) == 3 else 1
    # one position of great magnitude counts no more than the others
    target[0].fill(100.0)
    output[0].fill(110.0)
    errors, power = ((output - target) ** 2).sum(axis), (target**2).mean(axis)
    expected = (errors / np.maximum(power, 1e-3 * power.mean())).mean()
    got = RelativeMSELoss()(torch.from_numpy(output), torch.from_numpy(target))
    assert got.shape == ()
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_relative_mse_of_nothing_is_finite() -> None:
    assert float(RelativeMSELoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))) == 0


@SHAPES
@pytest.mark.parametrize('floor', [0.0, 0.3])
def test_fisher_weighs_every_element(shape: tuple[int, ...], floor: float) -> None:
    output, target, fisher = arrays(shape)
    weight = floor + (1 - floor) * fisher
    expected = (weight * (output - target) ** 2).sum() / (np.prod(shape) / shape[1])
    got = FisherLoss(floor=floor)(*(torch.from_numpy(a) for a in (output, target, fisher)))
    assert float(got) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('floor', [-0.1, 1.5, '0.5'])
def test_the_floor_is_a_share(floor: Any) -> None:
    with pytest.raises(ConfigError, match=r'expected floor of FisherLoss to be a number in \[0, 1\], but got'):
        FisherLoss(floor)


def test_weights_of_one_are_plain_mse() -> None:
    output, target, _ = (torch.from_numpy(a) for a in arrays((4, 3, 5, 2)))
    same = FisherLoss()(output, target, torch.ones_like(output))
    assert float(same) == pytest.approx(float(MSELoss()(output, target)), rel=1e-12)


def test_gradient_of_the_output() -> None:
    output, target, fisher = (torch.from_numpy(a) for a in arrays((4, 3, 5, 2)))
    output.requires_grad_(True)
    FisherLoss()(output, target, fisher).backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, 2 * fisher * (output - target).detach() / (4 * 5 * 2))


Prepare = Callable[..., QuantizedModel]
MakeTask = Callable[..., Task]


def reference(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squared gradients of the float model's own layers, image by image, normalised to mean 1."""
    rows: dict[str, list[Tensor]] = {}
    for image, target in zip(images, targets, strict=True):
        backbone = model.backbone
        x = torch.relu(backbone.stem(image[None]))
        values = {'activation_quantizers_relu': x}
        values['activation_quantizers_relu_2'] = x = backbone.first(x)
        values['activation_quantizers_relu_4'] = x = backbone.second(backbone.pool(x))
        values['head_fc'] = logits = model.head(x)
        loss = -torch.log_softmax(logits[0], 0)[target]
        for name, gradient in zip(values, torch.autograd.grad(loss, list(values.values())), strict=True):
            rows.setdefault(name, []).append(gradient**2)
    weights = {name: torch.cat(parts) for name, parts in rows.items()}
    return {name: weight / weight.double().mean().float() for name, weight in weights.items()}


@pytest.mark.parametrize('place', ['host', 'disk'])
def test_squared_gradients_of_every_image(
    prepared: Prepare, classifier: nn.Module, task: MakeTask, targets: Tensor, tmp_path: Path, place: str
) -> None:
    """The batches are of 10, 10 and 4 images: the mean over a batch plays no part, nor does quantization."""
    work = task(prepared())
    expected = reference(classifier, work.images, targets)
    cache = ActivationCache(CachePlan(place, 0, ''), torch.device('cpu'), tmp_path)
    weights = task_fisher(work.model, work.batches(), work.images, work.task_loss, cache).values
    # none for the unit without layers
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        torch.testing.assert_close(weight[:], expected[name], rtol=1e-3, atol=1e-4)
        assert float(weight[:].double().mean()) == pytest.approx(1, abs=1e-4)


def test_an_error_counts_by_what_it_does_to_the_task_loss(
    prepared: Prepare, classifier: nn.Module, task: MakeTask, host: ActivationCache, targets: Tensor
) -> None:
    """Reference: the rise of the second-order model of the loss, for an error of 1 everywhere in an output."""
    work = task(prepared())
    shares = task_fisher(work.model, work.batches(), work.images, work.task_loss, host).shares
    x = torch.relu(classifier.backbone.stem(work.images))
    values = {'activation_quantizers_relu': x}
    values['head_fc'] = logits = classifier.head(
        classifier.backbone.second(classifier.backbone.pool(classifier.backbone.first(x)))
    )
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction='sum')
    for (name, value), gradient in zip(values.items(), torch.autograd.grad(loss, list(values.values())), strict=True):
        assert shares[name] == pytest.approx(float(gradient.square().sum()) / len(value) / value.shape[1], rel=1e-3)


def test_outputs_count_beside_each_other() -> None:
    names = ('scores', 'deltas', 'unseen')
    values: Any = {name: object() for name in names}
    weights = FisherWeights(values, {'scores': 1.0, 'deltas': 7.0, 'unseen': 0.0})
    # an output without gradients counts as the others do on average
    assert weights.of(names) == ([values[name] for name in names], [0.25, 1.75, 1.0])
    assert weights.of(['deltas'])[1] == weights.of(['unseen'])[1] == [1.0]


def test_the_model_is_left_as_it_was(prepared: Prepare, task: MakeTask, host: ActivationCache) -> None:
    work = task(prepared())
    model = work.model
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    expected = model(work.images)
    task_fisher(model, work.batches(), work.images, work.task_loss, host)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert torch.equal(model.model(work.images, mode='tensor'), expected)
    runs = []
    model.image_graph.compiled.register_forward_hook(lambda *args: runs.append(args))
    with model.quantization(True, True):
        quantized = model.model(work.images, mode='tensor')
    assert not torch.equal(quantized, expected)
    # by the graph as before, not by what recorded it
    assert len(runs) == 1


def test_the_model_survives_an_error(prepared: Prepare, task: MakeTask, host: ActivationCache) -> None:
    work = task(prepared())
    expected = work.model(work.images)

    def fail(batch: Any, images: Tensor) -> Tensor:
        work.task_loss(batch, images)
        raise RuntimeError('no labels')

    with pytest.raises(RuntimeError, match='no labels'):
        task_fisher(work.model, work.batches(), work.images, fail, host)
    assert torch.equal(work.model.model(work.images, mode='tensor'), expected)
    assert not any(fake_quant.enabled for _, _, fake_quant in work.model.weights())


@pytest.mark.parametrize(
    ('factor', 'message'),
    [
        (0.0, r'^expected gradients of the loss at the outputs of the units, but all of them are zero: \['),
        (float('nan'), r"^expected finite gradients at 'activation_quantizers_relu', but their mean square is nan$"),
    ],
)
def test_gradients_that_say_nothing(
    prepared: Prepare, task: MakeTask, host: ActivationCache, factor: float, message: str
) -> None:
    work = task(prepared())
    with pytest.raises(NonFiniteError, match=message):
        task_fisher(work.model, work.batches(), work.images, lambda batch, x: factor * work.task_loss(batch, x), host)


def test_outputs_that_the_loss_does_not_depend_on_count_unweighted(
    prepared: Prepare, task: MakeTask, host: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of the values before the classifier: like a level of a pyramid without objects."""
    work, told = task(prepared()), []
    monkeypatch.setattr('mmbrecq.reconstruction.losses.print_log', lambda message, **_: told.append(message))
    recorder = []
    pool = work.model.image_graph.compiled.get_submodule('backbone.pool')
    pool.register_forward_hook(lambda module, inputs, output: recorder.append(output))

    def of_the_backbone(batch: Any, images: Tensor) -> Tensor:
        work.task_loss(batch, images)
        return recorder[-1].square().mean()

    weights = task_fisher(work.model, work.batches(), work.images, of_the_backbone, host).values
    for name in ('activation_quantizers_relu_4', 'head_fc'):
        assert torch.equal(weights[name][:], torch.ones_like(weights[name][:]))
    for name in ('activation_quantizers_relu', 'activation_quantizers_relu_2'):
        assert float(weights[name][:].double().mean()) == pytest.approx(1, abs=1e-4)
        assert float(weights[name][:].std()) > 0.1
    (message,) = told
    assert "['activation_quantizers_relu_4', 'head_fc']" in message and 'unweighted' in message


def test_without_annotations_the_distance_of_the_outputs(
    prepared: Prepare, classifier: nn.Module, task: MakeTask, host: ActivationCache
) -> None:
    """Reference: the model's own layers with the weights rounded to nearest; the last batch is smaller."""
    work = task(prepared())
    with work.model.quantization(True, False):
        rounded = {name: module.weight.detach().clone() for name, module, _ in work.model.weights()}
    weights = output_fisher(work.model.image_graph, work.images, work.images, host, batch_size=10).values

    expected_logits = classifier(work.images).detach()
    for name, weight in rounded.items():
        classifier.get_submodule(name).weight.data.copy_(weight)
    backbone = classifier.backbone
    x = torch.relu(backbone.stem(work.images))
    values = {'activation_quantizers_relu': x}
    values['activation_quantizers_relu_2'] = x = backbone.first(x)
    values['activation_quantizers_relu_4'] = x = backbone.second(backbone.pool(x))
    values['head_fc'] = logits = classifier.head(x)
    scales = torch.cat([part.square().mean().expand(len(part)) for part in expected_logits.split(10)])
    distance = ((logits - expected_logits).square().sum(1) / scales).sum()
    gradients = torch.autograd.grad(distance, list(values.values()))
    assert set(weights) == set(values)
    for name, gradient in zip(values, gradients, strict=True):
        expected = gradient**2 / (gradient**2).mean()
        torch.testing.assert_close(weights[name][:], expected, rtol=1e-3, atol=1e-4)


def test_the_loss_says_what_it_weighs_by(prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared())
    reconstructor = BRECQReconstructor(loss={'type': 'FisherLoss'})
    assert reconstructor.describe_loss(work) == 'FisherLoss, by the task loss on annotated images'
    work.task_loss = None
    assert reconstructor.describe_loss(work) == (
        'FisherLoss, by the distance of quantized from float outputs, for there are no annotations'
    )
    assert BRECQReconstructor().describe_loss(work) == 'MSELoss'
