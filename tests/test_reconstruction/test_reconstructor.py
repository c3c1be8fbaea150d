from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmbrecq.errors import ConfigError, NonFiniteError, StorageError
from mmbrecq.observers.base import BaseObserver
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, QDropReconstructor, Task, UnitResult, working_memory
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.reconstructor import BaseReconstructor, unit_generator
from mmbrecq.reconstruction.stages import Stage, StageOptions
from mmbrecq.reconstruction.values import CachedValues
from mmbrecq.registry import RECONSTRUCTORS

Prepare = Callable[..., QuantizedModel]
MakeTask = Callable[..., Task]

WEIGHTS: dict[str, Any] = {'iterations': 60, 'batch_size': 10, 'lr': 4e-2, 'round_weight': 0.05}
ACTIVATIONS: dict[str, Any] = {'iterations': 40, 'batch_size': 10, 'activation_lr': 2e-3}
UNITS = ['backbone.stem', 'backbone.first', 'backbone.second', 'head.fc']


class Diary:
    """Listens, and notes what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.on_unit: Callable[[str], None] = lambda name: None

    def before_stage(self, stage: Any, units: Any, progress: Any) -> None:
        self.events.append(('before_stage', stage.name, len(units)))

    def before_unit(self, stage: Any, unit: Any) -> None:
        self.events.append(('before_unit', stage.name, unit.name))
        self.on_unit(unit.name)

    def after_step(self, stage: Any, unit: Any, step: int, loss: float) -> None:
        self.events.append(('after_step', stage.name, unit.name, step))

    def after_unit(self, stage: Any, unit: Any, result: UnitResult, progress: Any) -> None:
        self.events.append(('after_unit', stage.name, unit.name, result))

    def after_stage(self, stage: Any) -> None:
        self.events.append(('after_stage', stage.name))


def brecq(weights: Any = None, activations: Any = None, **common: Any) -> BRECQReconstructor:
    return BRECQReconstructor({**WEIGHTS, **(weights or {})}, {**ACTIVATIONS, **(activations or {})}, **common)


def qdrop(**options: Any) -> QDropReconstructor:
    return QDropReconstructor({**WEIGHTS, 'activation_lr': 2e-3, **options})


def run(reconstructor: BaseReconstructor, task: Task, diary: Diary | None = None) -> list[UnitResult]:
    return reconstructor.run(task, reconstructor.plan(task), diary or Diary())


def state_of(task: Task) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def outputs(model: QuantizedModel, images: Tensor, weights: bool = True, activations: bool = True) -> Tensor:
    with torch.no_grad(), model.quantization(weights, activations):
        return model(images)


def squared_error(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()) ** 2).sum(1).mean())


def test_both_are_registered() -> None:
    assert RECONSTRUCTORS.get('BRECQReconstructor') is BRECQReconstructor
    assert RECONSTRUCTORS.get('QDropReconstructor') is QDropReconstructor


def test_every_unit_gets_better_than_nearest_rounding(prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared())
    results = run(brecq(), work)
    assert [(r.stage, r.name) for r in results] == [(s, n) for s in ('weights', 'activations') for n in UNITS]
    for result in results[:4]:
        assert result.loss_after < result.loss_before, result
        assert not result.kept_nearest
        assert result.iterations == WEIGHTS['iterations']
    for result in results[4:]:
        assert result.loss_after <= result.loss_before, result
        assert result.iterations == ACTIVATIONS['iterations']
    assert results[1].layers == ('backbone.first.conv1', 'backbone.first.conv2')


def test_the_network_comes_closer_to_the_float_model(
    prepared: Prepare, task: MakeTask, classifier: nn.Module, images: Tensor
) -> None:
    work = task(prepared())
    with torch.no_grad():
        target = classifier(images)
    before = [squared_error(outputs(work.model, images, True, a), target) for a in (False, True)]
    run(brecq(), work)
    after = [squared_error(outputs(work.model, images, True, a), target) for a in (False, True)]
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.5 * before[1]


@pytest.mark.parametrize(('loss', 'annotated'), [('MSELoss', True), ('FisherLoss', True), ('FisherLoss', False)])
def test_the_network_pass_fits_the_outputs_and_keeps_the_rounding(
    loss: str,
    annotated: bool,
    prepared: Prepare,
    task: MakeTask,
    classifier: nn.Module,
    images: Tensor,
    targets: Tensor,
) -> None:
    alone, followed = (
        replace(w, task_loss=w.task_loss if annotated else None) for w in (task(prepared()), task(prepared()))
    )
    run(QDropReconstructor(WEIGHTS, loss={'type': loss}), alone)
    results = run(QDropReconstructor(WEIGHTS, network=ACTIVATIONS, loss={'type': loss}), followed)
    assert [(r.stage, r.name) for r in results] == [('joint', name) for name in UNITS] + [('network', 'net0')]
    assert set(results[-1].layers) == {layer.name for layer in followed.model.layers}
    with torch.no_grad():
        logits = classifier(images)
    weights = torch.ones_like(logits)
    if loss == 'FisherLoss' and annotated:
        # the gradient of cross-entropy; without annotations nothing is known of how much an output matters
        weights = (logits.softmax(1) - nn.functional.one_hot(targets, logits.shape[1])).square()
        weights /= weights.mean()
    before, after = (
        float(((outputs(work.model, images) - logits).square() * weights).sum(1).mean()) for work in (alone, followed)
    )
    assert results[-1].loss_before == pytest.approx(before, rel=1e-3)
    assert results[-1].loss_after == pytest.approx(after, rel=1e-3)
    assert after < 0.95 * before
    for (_, _, one), (_, _, other) in zip(alone.model.weights(), followed.model.weights(), strict=True):
        assert torch.equal(one.codes, other.codes)


def test_the_network_pass_starts_from_the_learned_step_sizes(prepared: Prepare, task: MakeTask) -> None:
    alone, followed = task(prepared()), task(prepared())
    still = {'iterations': 2, 'bias_lr': 0.0, 'weight_scale_lr': 0.0, 'activation_lr': 0.0}
    run(qdrop(), alone)
    run(QDropReconstructor({**WEIGHTS, 'activation_lr': 2e-3}, network=still), followed)
    for name, quantizer in alone.model.image_graph.quantizers.items():
        assert torch.equal(quantizer.scale, followed.model.image_graph.quantizers[name].scale)


def test_losses_are_those_of_the_model(
    prepared: Prepare, task: MakeTask, classifier: nn.Module, images: Tensor
) -> None:
    """Over all images, the last partial batch too: of the first unit before, of the last one after."""
    work = task(prepared())
    stem = work.model.image_graph.units[0]
    with torch.no_grad():
        target = torch.relu(classifier.backbone.stem(images))
        with work.model.quantization(True, False):
            nearest = stem.module(images)[0]
        logits = classifier(images)
    results = run(brecq(), work)
    assert results[0].loss_before == pytest.approx(squared_error(nearest, target), rel=1e-4)
    assert results[3].loss_after >= 0
    got = squared_error(outputs(work.model, images), logits)
    # one rounding boundary crossed by another order of summation moves a single value by a step
    assert results[-1].loss_after == pytest.approx(got, rel=2e-2)


def test_what_was_learned_is_on_the_grid(prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared())
    nearest = {name: fq.codes.clone() for name, _, fq in work.model.weights()}
    run(brecq({'weight_scale_lr': 0.0}), work)
    moved = 0
    for name, _, fake_quant in work.model.weights():
        assert 0 <= int(fake_quant.codes.min()) <= int(fake_quant.codes.max()) <= 3
        # up instead of down, or the other way round
        difference = (fake_quant.codes.int() - nearest[name].int()).abs()
        assert int(difference.max()) <= 1
        moved += int(difference.sum())
    assert moved > 0


def test_a_unit_that_gets_worse_keeps_what_it_had(prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared(activation_bits=None))
    before = state_of(work)
    diary = Diary()
    results = run(brecq({'weight_scale_lr': 30.0, 'bias_lr': 30.0}), work, diary)
    assert [r.kept_nearest for r in results] == [True] * 4
    assert all(r.loss_after == r.loss_before > 0 for r in results)
    assert all(r.iterations == WEIGHTS['iterations'] for r in results)
    assert same(state_of(work), before)


def test_keeping_is_decided_unit_by_unit(prepared: Prepare, task: MakeTask) -> None:
    """In the second stage every step size goes astray: those of the weights' stage are left as they were."""
    work, only_weights = task(prepared()), task(prepared())
    results = run(brecq(activations={'activation_lr': 50.0, 'weight_scale_lr': 0.0, 'bias_lr': 0.0}), work)
    assert not any(r.kept_nearest for r in results[:4])
    assert [r.kept_nearest for r in results[4:]] == [True] * 4
    run(
        brecq(activations={'iterations': 1, 'activation_lr': 1e-9, 'weight_scale_lr': 0.0, 'bias_lr': 0.0}),
        only_weights,
    )
    expected = state_of(only_weights)
    for name, tensor in state_of(work).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_a_kept_unit_hands_on_what_it_had(prepared: Prepare, task: MakeTask, images: Tensor) -> None:
    """The last unit's loss is that of the model as it is kept, so no learned output has leaked into the stream."""
    work = task(prepared(activation_bits=None))
    results = run(brecq({'weight_scale_lr': 30.0, 'bias_lr': 30.0}), work)
    target, got = outputs(work.model, images, False, False), outputs(work.model, images)
    assert results[-1].loss_before == pytest.approx(squared_error(got, target), rel=1e-4)


@pytest.mark.parametrize('make', [brecq, qdrop])
def test_the_seed_decides_and_nothing_else(prepared: Prepare, task: MakeTask, make: Any) -> None:
    states, losses = [], []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        work = task(prepared(), seed)
        torch.manual_seed(global_seed)
        losses.append([(r.loss_before, r.loss_after) for r in run(make(), work)])
        states.append(state_of(work))
    assert same(states[0], states[1])
    assert losses[0] == losses[1]
    assert not same(states[0], states[2])


@pytest.mark.parametrize('count', [1, 3])
def test_units_that_are_done_are_passed(prepared: Prepare, task: MakeTask, count: int) -> None:
    whole, rest = task(prepared()), task(prepared())
    results = run(qdrop(), whole)
    done = {name: tensor for name, tensor in state_of(whole).items() if not name.startswith('head')}
    names = frozenset(('joint', unit) for unit in UNITS[:count])
    if count == 3:
        rest.model.model.load_state_dict(done, strict=False)
    diary = Diary()
    remaining = run(qdrop(), replace(rest, done=names), diary)
    assert [r.name for r in remaining] == UNITS[count:]
    assert [event[2] for event in diary.events if event[0] == 'before_unit'] == UNITS[count:]
    if count == 3:
        assert same(state_of(rest), state_of(whole))
        assert (remaining[0].loss_before, remaining[0].loss_after) == (results[-1].loss_before, results[-1].loss_after)
    else:
        assert remaining[0].loss_before != results[1].loss_before, 'the first unit kept its nearest rounding'


def test_independent_units_learn_the_same_whatever_the_others_did(prepared: Prepare, task: MakeTask) -> None:
    def learned(independent: bool, done: frozenset[tuple[str, str]]) -> tuple[UnitResult, dict[str, Tensor]]:
        stage = Stage('weights', StageOptions(**WEIGHTS), True, False, independent=independent)
        work = replace(task(prepared()), done=done)
        reconstructor = BaseReconstructor()
        reconstructor.stages = (stage,)
        results = run(reconstructor, work)
        return results[-1], {name: t for name, t in state_of(work).items() if name.startswith('head')}

    before = frozenset(('weights', unit) for unit in UNITS[:3])
    (first, state), (second, other) = learned(True, frozenset()), learned(True, before)
    assert (first.loss_before, first.loss_after) == (second.loss_before, second.loss_after)
    assert same(state, other)
    assert learned(False, frozenset())[0].loss_before != learned(False, before)[0].loss_before


def test_a_unit_draws_by_seed_stage_and_name() -> None:
    def draw(seed: int, stage: str, unit: str) -> tuple[int, ...]:
        return tuple(torch.randperm(1000, generator=unit_generator(seed, stage, unit)).tolist())

    keys = [(0, 'weights', 'a'), (1, 'weights', 'a'), (0, 'joint', 'a'), (0, 'weights', 'b'), (11, 'weights', 'a')]
    assert len({draw(*key) for key in keys}) == len(keys)
    first = draw(*keys[0])
    torch.manual_seed(5)
    assert draw(*keys[0]) == first


def test_units_before_do_not_change_what_a_unit_draws(
    prepared: Prepare, task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[dict[str, Tensor]] = [{}, {}]

    def spy(into: dict[str, Tensor]) -> Any:
        original = unit_generator

        def make(seed: int, stage: str, unit: str) -> torch.Generator:
            generator = original(seed, stage, unit)
            into[f'{stage}/{unit}'] = generator.get_state()
            return generator

        return make

    for into, granularity, iterations in zip(draws, ('block', 'layer'), (5, 9), strict=True):
        monkeypatch.setattr('mmbrecq.reconstruction.reconstructor.unit_generator', spy(into))
        run(brecq({'iterations': iterations}, {'iterations': iterations}), task(prepared(granularity=granularity)))
        monkeypatch.undo()
    shared = draws[0].keys() & draws[1].keys()
    assert {'weights/backbone.stem', 'weights/head.fc', 'activations/head.fc'} <= shared
    assert all(torch.equal(draws[0][key], draws[1][key]) for key in shared)


def test_qdrop_learns_rounding_and_step_sizes_together(
    prepared: Prepare, task: MakeTask, classifier: nn.Module, images: Tensor
) -> None:
    work = task(prepared())
    with torch.no_grad():
        target = classifier(images)
    before = squared_error(outputs(work.model, images), target)
    codes = {name: fq.codes.clone() for name, _, fq in work.model.weights()}
    scales = {name: q.scale.detach().clone() for name, q in work.model.image_graph.quantizers.items()}
    results = run(qdrop(), work)
    assert [(r.stage, r.name) for r in results] == [('joint', name) for name in UNITS]
    assert all(r.loss_after <= r.loss_before for r in results)
    assert squared_error(outputs(work.model, images), target) < 0.5 * before
    assert any(not torch.equal(fq.codes, codes[name]) for name, _, fq in work.model.weights())
    assert any(not torch.equal(q.scale, scales[name]) for name, q in work.model.image_graph.quantizers.items())
    assert all(q.masks is None for q in work.model.image_graph.quantizers.values())


@pytest.mark.parametrize('granularity', ['layer', 'block', 'stage', 'net'])
def test_every_granularity(prepared: Prepare, task: MakeTask, images: Tensor, granularity: str) -> None:
    work = task(prepared(granularity=granularity))
    target = outputs(work.model, images, False, False)
    before = squared_error(outputs(work.model, images, True, False), target)
    results = run(brecq(), work)
    layers = [layer for r in results if r.stage == 'weights' for layer in r.layers]
    assert layers == [name for name, _, _ in work.model.weights()]
    assert squared_error(outputs(work.model, images, True, False), target) < before
    assert torch.equal(outputs(work.model, images, False, False), target)


def test_float_activations_need_no_second_stage(prepared: Prepare, task: MakeTask) -> None:
    diary = Diary()
    results = run(brecq(), task(prepared(activation_bits=None)), diary)
    assert {r.stage for r in results} == {'weights'}
    assert [e for e in diary.events if e[0] == 'before_stage'] == [('before_stage', 'weights', 5)]


def test_listeners_hear_everything_in_order(prepared: Prepare, task: MakeTask) -> None:
    diary = Diary()
    results = run(brecq({'iterations': 120}), task(prepared()), diary)
    expected: list[tuple[Any, ...]] = []
    for stage, steps in (('weights', [100, 120]), ('activations', [40])):
        expected.append(('before_stage', stage, 5))
        for name in UNITS:
            expected.append(('before_unit', stage, name))
            expected += [('after_step', stage, name, step) for step in steps]
            expected.append(('after_unit', stage, name, next(r for r in results if (r.stage, r.name) == (stage, name))))
        expected.append(('after_stage', stage))
    assert diary.events == expected


def test_the_model_ends_with_its_switches_off(prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared())
    expected = work.model(work.images)
    run(brecq(), work)
    assert not any(fq.enabled for _, _, fq in work.model.weights())
    assert not any(q.enabled or q.observer for q in work.model.image_graph.quantizers.values())
    assert torch.equal(work.model(work.images), expected)
    names = {name for name, p in work.model.model.named_parameters() if p.requires_grad}
    assert not names


def test_the_place_of_the_cache_changes_nothing(
    prepared: Prepare, task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, states, runs, seen = os.posix_fallocate, [], [], []
    monkeypatch.setattr(os, 'posix_fallocate', lambda *given: runs.append(len(states)) or reserve(*given))
    for place in ('host', 'disk'):
        work = task(prepared())
        diary = Diary()
        diary.on_unit = lambda name: seen.extend(tmp_path.iterdir())
        run(brecq(cache=place), work, diary)
        states.append(state_of(work))
    assert same(*states)
    # the second run has files, which have no name
    assert (set(runs), seen) == ({1}, [])


def test_too_little_room_is_said_before_any_work(
    prepared: Prepare, task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = task(prepared())
    before = state_of(work)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=100))
    with pytest.raises(StorageError, match="of activations at unit 'backbone.first', but there are only 100 B on disk"):
        brecq(cache='disk').plan(work)
    with pytest.raises(StorageError, match=r"^expected .* MB of memory for the work on unit 'backbone\.\w+', but"):
        brecq(memory_limit='1kB').plan(work)
    assert same(state_of(work), before)


def test_a_memory_limit_sends_activations_to_the_disk(prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared())
    plan = brecq().plan(work)
    assert (plan.place, plan.peak_unit) == ('host', 'backbone.first')
    limited = brecq(memory_limit=plan.working_bytes).plan(work)
    assert (limited.place, limited.peak_bytes) == ('disk', plan.peak_bytes)
    assert brecq(memory_limit=plan.working_bytes + plan.peak_bytes).plan(work).place == 'host'


def test_as_many_images_as_the_limit_has_room_for_are_observed(
    prepared: Prepare, task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_memory, 'BASE', 0)
    work = task(prepared())
    passed: list[int] = []
    observe = BaseObserver.observe
    monkeypatch.setattr(BaseObserver, 'observe', lambda self, x: (passed.append(len(x)), observe(self, x))[1])
    made = brecq(weights={'iterations': 1, 'batch_size': 4}, activations={'iterations': 1, 'batch_size': 4})
    whole = made.plan(work)
    made.run(work, whole, Diary())
    assert whole.observed == 64 and max(passed) == len(work.images)
    passed.clear()
    made.limit = whole.working_bytes // 4
    limited = made.plan(work)
    assert limited.observed < len(work.images) and limited.working_bytes <= made.limit
    made.run(work, limited, Diary())
    assert max(passed) == limited.observed
    # a resumed run observes as it began, and is refused where that has no room
    assert brecq().plan(replace(work, observed=limited.observed)).observed == limited.observed
    with pytest.raises(StorageError, match=r'for the work on unit '):
        made.plan(replace(work, observed=64))


def test_bfloat16_takes_half_of_the_room(prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared())
    plans = [brecq(cache_dtype=dtype).plan(work) for dtype in ('float32', 'bfloat16')]
    assert [plan.dtype for plan in plans] == [torch.float32, torch.bfloat16]
    assert plans[0].peak_unit == plans[1].peak_unit == 'backbone.first'
    # the images stay as they are
    images = 4 * work.images.numel()  # type: ignore[union-attr]
    assert plans[0].peak_bytes - images == 2 * (plans[1].peak_bytes - images)


@pytest.mark.parametrize('place', ['host', 'disk'])
@pytest.mark.parametrize('loss', ['MSELoss', 'FisherLoss'])
def test_bfloat16_learns_nearly_as_well(prepared: Prepare, task: MakeTask, place: str, loss: str) -> None:
    exact, rounded = (
        run(brecq(cache=place, cache_dtype=dtype, loss={'type': loss}), task(prepared()))
        for dtype in ('float32', 'bfloat16')
    )
    for expected, result in zip(exact, rounded, strict=True):
        # the first unit differs by the rounding of the cache alone
        tolerance = 0.02 if result.name == UNITS[0] and result.stage == 'weights' else 0.3
        assert result.loss_before == pytest.approx(expected.loss_before, rel=tolerance)
    assert [r.loss_after for r in exact] != [r.loss_after for r in rounded]
    assert all(r.loss_after <= r.loss_before for r in rounded)


def test_an_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match=r"cache_dtype to be one of \['float32', 'bfloat16'\], but got 'float16'$"):
        brecq(cache_dtype='float16')


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'loss': {'type': 'FisherLoss'}, 'network': ACTIVATIONS},
        {'loss': {'type': 'FisherLowRankLoss'}, 'global_weight': 1.0},
    ],
    ids=['mse', 'fisher', 'low-rank'],
)
def test_no_more_is_cached_than_was_planned(
    options: dict[str, Any], prepared: Prepare, task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all values that the cache has given and that are still referred to."""
    work = task(prepared())
    allocate = ActivationCache.allocate
    live = peak = 0

    def freed(size: int) -> None:
        nonlocal live
        live -= size

    def counted(self: ActivationCache, shape: Any, *layout: Any, like: Any = None) -> CachedValues:
        nonlocal live, peak
        values = allocate(self, shape, *layout)
        size = 4 * torch.Size(shape).numel()
        live += size
        peak = max(peak, live)
        weakref.finalize(values, freed, size)
        return values

    monkeypatch.setattr(ActivationCache, 'allocate', counted)
    reconstructor = brecq({'iterations': 2}, {'iterations': 2}, cache='host', **options)
    plan = reconstructor.plan(work)
    reconstructor.run(work, plan, Diary())
    # the images are there from the start to the end
    assert peak + 4 * work.images.numel() == plan.peak_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize('granularity', ['layer', 'block'])
def test_fisher_loss_lowers_every_unit(prepared: Prepare, task: MakeTask, images: Tensor, granularity: str) -> None:
    work = task(prepared(granularity=granularity))
    target = outputs(work.model, images, False, False)
    before = squared_error(outputs(work.model, images), target)
    results = run(brecq(loss={'type': 'FisherLoss'}), work)
    assert [layer for r in results[: len(results) // 2] for layer in r.layers] == [
        n for n, _, _ in work.model.weights()
    ]
    assert all(r.loss_after <= r.loss_before for r in results)
    assert squared_error(outputs(work.model, images), target) < 0.5 * before


@pytest.mark.parametrize('make', [brecq, qdrop])
def test_mirror_images_are_learned_from_like_others(prepared: Prepare, task: MakeTask, make: Any) -> None:
    plain, mirrored, doubled = task(prepared()), task(prepared()), task(prepared())
    images = plain.images
    assert not torch.equal(images, images.flip(-1))
    run(make(), plain)
    extended = make()
    extended.mirror = True
    results = run(extended, mirrored)
    expected = run(make(), replace(doubled, images=torch.cat([images, images.flip(-1)])))
    assert same(state_of(mirrored), state_of(doubled))
    assert not same(state_of(mirrored), state_of(plain))
    assert [(r.name, r.loss_after) for r in results] == [(r.name, r.loss_after) for r in expected]
    plans = extended.plan(mirrored), make().plan(plain)
    # mirror images are made when they are read
    kept = 4 * images.numel()  # type: ignore[union-attr]
    assert plans[0].peak_bytes - kept == 2 * (plans[1].peak_bytes - kept)


def test_mirror_images_have_no_fisher_weights() -> None:
    with pytest.raises(ConfigError, match='with reconstructor.mirror, such as MSELoss, but got FisherLoss'):
        QDropReconstructor(loss={'type': 'FisherLoss'}, mirror=True)


def test_a_loss_that_is_not_finite_stops_the_run(prepared: Prepare, task: MakeTask, tmp_path: Path) -> None:
    work = task(prepared())
    work.images[5, 0, 0, 0] = float('nan')
    with pytest.raises(NonFiniteError, match=r"^the loss of unit 'backbone\.stem' is nan at iteration \d+$"):
        run(brecq(cache='disk'), work)
    assert not list(tmp_path.iterdir())
