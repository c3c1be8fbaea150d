"""Images of two orientations: each group is carried at its own size, and a step is of one of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmbrecq import pipeline
from mmbrecq.data.groups import Grouped, batches_of
from mmbrecq.mixed_precision.sensitivity.measure import OutputLoss, squared_gradients
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, QDropReconstructor, Task
from mmbrecq.reconstruction.batches import Batches, UnitData
from mmbrecq.reconstruction.cache import ActivationCache, CachePlan, images_on_disk
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.losses import output_fisher, task_fisher
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.results import FinishedUnit, UnitResult, unit_state
from mmbrecq.reconstruction.streams import Streams

Prepare = Callable[..., QuantizedModel]
MakeTask = Callable[..., Task]

WIDE, HIGH = 14, 10
WEIGHTS: dict[str, Any] = {'iterations': 60, 'batch_size': 10, 'lr': 4e-2, 'round_weight': 0.05}
ACTIVATIONS: dict[str, Any] = {'iterations': 40, 'batch_size': 10, 'activation_lr': 2e-3}


def brecq(**common: Any) -> BaseReconstructor:
    return BRECQReconstructor(WEIGHTS, ACTIVATIONS, **common)


def qdrop(**common: Any) -> BaseReconstructor:
    return QDropReconstructor({**WEIGHTS, 'activation_lr': 2e-3}, **common)


def run(reconstructor: BaseReconstructor, task: Task) -> list[UnitResult]:
    return reconstructor.run(task, reconstructor.plan(task), Callback())


def state_of(task: Task) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def mixed(images: Tensor) -> Grouped:
    """The images of the other tests, some of them made wider, the others higher."""
    stretch: Any = nn.functional.interpolate
    parts = [stretch(images[:WIDE], (8, 14), mode='bilinear'), stretch(images[WIDE:], (12, 8), mode='bilinear')]
    return Grouped(parts, [WIDE, WIDE + HIGH])


@pytest.fixture
def work(prepared: Prepare, task: MakeTask, mixed: Grouped, targets: Tensor) -> Callable[..., Task]:
    """``work(**options)``: a task on the images of both groups, with calibrated grids; its batches are of 10 images."""

    def make(**options: Any) -> Task:
        def batches() -> list[dict[str, Any]]:
            return [{'inputs': list(mixed[b]), 'data_samples': targets[b]} for b in batches_of(mixed, 10)]

        made = replace(task(prepared(**options)), images=mixed, batches=batches)
        pipeline.calibrate(made)
        return made

    return make


@pytest.mark.parametrize('place', ['host', 'disk'])
def test_cached_values_of_each_group_are_the_float_models(
    prepared: Prepare, classifier: nn.Module, mixed: Grouped, tmp_path: Path, place: str
) -> None:
    backbone, head, expected = classifier.backbone, classifier.head, []
    with torch.no_grad():
        for x in mixed.parts:
            values = {'backbone.stem': torch.relu(backbone.stem(x))}
            values['backbone.first'] = backbone.first(values['backbone.stem'])
            values['backbone.second'] = backbone.second(backbone.pool(values['backbone.first']))
            values['head.fc'] = head(values['backbone.second'])
            expected.append(values)
    graph, seen = prepared().image_graph, set()
    cache = ActivationCache(CachePlan(place, 0, ''), torch.device('cpu'), tmp_path)
    streams = Streams(graph, graph.units, cache.hold(mixed), cache, 4)
    for index, unit in enumerate(graph.units):
        outputs = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
        streams.advance(index, outputs, outputs)
        if unit.name in expected[0]:
            seen.add(unit.name)
            (value,) = outputs
            assert isinstance(value, Grouped) and len(value) == WIDE + HIGH
            for part, wanted in zip(value.parts, expected, strict=True):
                torch.testing.assert_close(part[:], wanted[unit.name], rtol=1e-5, atol=1e-5)
    assert seen == set(expected[0])


@pytest.mark.parametrize('place', ['host', 'disk'])
def test_a_step_is_of_one_group(tmp_path: Path, place: str) -> None:
    """A group gets its share of the steps; a group of fewer images than a batch gives them all."""
    groups = Grouped([torch.arange(12.0).reshape(12, 1), torch.full((4, 3), 100.0)], [12, 16])
    cache = ActivationCache(CachePlan(place, 0, ''), torch.device('cpu'), tmp_path)
    values = cache.allocate((16, 1), like=groups)
    for batch in batches_of(groups, 5):
        values.write(batch.start, groups[batch])
    drawn = []
    for _ in range(2):
        generator, seen = torch.Generator().manual_seed(3), []
        with Batches(UnitData([values], [values], [values]), 6, 200, generator, torch.device('cpu'), True) as steps:
            for _ in range(200):
                steps.begin()
                seen.append(steps.current().targets[0])
                steps.prefetch()
        drawn.append(seen)
    assert {tuple(x.shape) for x in drawn[0]} == {(6, 1), (4, 3)}
    assert all(len(set(x[:, 0].tolist())) == 6 for x in drawn[0] if x.shape[1] == 1)
    assert 0.65 < np.mean([x.shape[1] == 1 for x in drawn[0]]) < 0.85
    assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))


@pytest.mark.parametrize('options', [{}, {'mirror': True}, {'loss': {'type': 'FisherLoss'}}], ids=str)
@pytest.mark.parametrize('make', [brecq, qdrop])
def test_every_unit_gets_better_on_both_groups(work: Callable[..., Task], options: dict[str, Any], make: Any) -> None:
    results = run(make(**options), work())
    assert all(0 < result.loss_after <= result.loss_before for result in results)
    assert sum(result.loss_after < 0.9 * result.loss_before for result in results) >= 2


def test_one_group_is_no_group(work: Callable[..., Task], images: Tensor, mixed: Grouped) -> None:
    """The draws, too, are those of plain images."""
    states = []
    for own in (images, Grouped([images], [len(images)])):
        made = replace(work(), images=own, task_loss=None)
        pipeline.calibrate(made)
        results = run(brecq(loss={'type': 'FisherLoss'}), made)
        states.append((state_of(made), [(r.name, r.loss_before, r.loss_after) for r in results]))
    assert same(states[0][0], states[1][0]) and states[0][1] == states[1][1]


class Recorder(Callback):
    """Keeps what every unit has learned."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.finished: dict[tuple[str, str], FinishedUnit] = {}

    def after_unit(self, stage: Any, unit: Any, result: UnitResult, progress: Any) -> None:
        state = unit_state(self.task.model.model, unit)
        self.finished[stage.name, unit.name] = FinishedUnit(result, state)


@pytest.mark.parametrize('place', ['host', 'disk'])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(work: Callable[..., Task], place: str) -> None:
    whole, again = work(), work()
    recorder, reconstructor = Recorder(whole), brecq(cache=place)
    reconstructor.run(whole, reconstructor.plan(whole), recorder)
    again.resumed = dict(list(recorder.finished.items())[:5])
    results = run(brecq(), again)
    assert [(r.stage, r.name) for r in results] == list(recorder.finished)[5:]
    assert same(state_of(again), state_of(whole))


@pytest.mark.parametrize('loss', ['task', 'output'])
def test_fisher_weights_of_each_group_are_its_own(
    work: Callable[..., Task], mixed: Grouped, host: ActivationCache, targets: Tensor, loss: str
) -> None:
    """Up to the mean, which is taken over both."""
    made = work()

    def weights(images: Any, batches: Any) -> Any:
        if loss == 'output':
            return output_fisher(made.model.image_graph, host.hold(images), host.hold(images), host, 8)
        return task_fisher(made.model, batches, images, made.task_loss, host)

    both = weights(mixed, made.batches())
    ends = [0, WIDE, WIDE + HIGH]
    for number, part in enumerate(mixed.parts):
        labels = targets[ends[number] : ends[number + 1]]
        alone = weights(part, [{'inputs': list(part), 'data_samples': labels}])
        for name, values in both.values.items():
            found, expected = values.parts[number][:], alone.values[name][:]
            torch.testing.assert_close(found / found.mean(), expected, rtol=1e-3, atol=1e-4)
    for name, values in both.values.items():
        whole = torch.cat([part[:].flatten() for part in values.parts])
        assert float(whole.mean()) == pytest.approx(1, rel=1e-4)
        assert both.shares[name] > 0


def test_sensitivities_are_measured_on_both_groups(work: Callable[..., Task], mixed: Grouped) -> None:
    made = work()
    graph, layers = made.model.image_graph, {layer.name for layer in made.model.layers}
    alone = [OutputLoss(graph, part).of(layers) for part in mixed.parts]
    expected = (WIDE * alone[0] + HIGH * alone[1]) / (WIDE + HIGH)
    assert OutputLoss(graph, mixed).of(layers) == pytest.approx(expected, rel=1e-5)
    few = made.images[: WIDE + 2]
    assert len(few) == WIDE + 2 and len(few.parts[1]) == 2
    (squares,) = squared_gradients(made.model, made.batches(), few, made.task_loss)
    assert len(squares) == WIDE + 2
    assert OutputLoss(graph, few, [squares]).of(layers) > 0


def test_no_more_is_cached_than_was_planned(work: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    made, allocate, live, peak = work(), ActivationCache.allocate, 0, 0

    def freed(size: int) -> None:
        nonlocal live
        live -= size

    def counted(self: ActivationCache, shape: Any, *more: Any, **options: Any) -> Any:
        nonlocal live, peak
        values = allocate(self, shape, *more, **options)
        if not isinstance(values, Grouped):
            size = 4 * torch.Size(shape).numel()
            live, peak = live + size, max(peak, live + size)
            weakref.finalize(values, freed, size)
        return values

    monkeypatch.setattr(ActivationCache, 'allocate', counted)
    reconstructor = BRECQReconstructor({'iterations': 2}, {'iterations': 2}, cache='host')
    plan = reconstructor.plan(made)
    reconstructor.run(made, plan, Callback())
    images = sum(part.numel() for part in made.images.parts) * 4  # type: ignore[union-attr]
    assert peak + images <= plan.peak_bytes < 1.02 * (peak + images)


def test_groups_move_to_the_disk(mixed: Grouped, tmp_path: Path) -> None:
    found = images_on_disk(mixed, tmp_path)
    assert isinstance(found, Grouped) and found.ends == mixed.ends
    for part, wanted in zip(found.parts, mixed.parts, strict=True):
        assert part.is_shared() and torch.equal(part, wanted)
