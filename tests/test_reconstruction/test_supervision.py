"""The rest of the network behind a unit against the whole network with the unit's output replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from mmbrecq.errors import ConfigError
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, QDropReconstructor, Task
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.results import FinishedUnit, UnitResult, unit_state
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.supervision import Supervision

Prepare = Callable[..., QuantizedModel]
MakeTask = Callable[..., Task]

JOINT: dict[str, Any] = {'iterations': 30, 'batch_size': 8}


class Pyramid(nn.Module):
    """Three outputs, one of them early, and a value that passes two units by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.early, self.scores, self.deltas = (nn.Conv2d(4, c, 1) for c in (2, 3, 4))

    def forward(self, inputs: Tensor) -> Any:
        first = torch.relu(self.stem(inputs))
        early = self.early(first)
        last = torch.relu(self.last(torch.relu(self.middle(first)))) + first
        return early, (self.scores(last), self.deltas(last))


def pyramid() -> nn.Module:
    torch.manual_seed(0)
    return Pyramid().eval()


def with_replaced(model: QuantizedModel, images: Tensor, names: tuple[str, ...], values: list[Tensor]) -> list[Tensor]:
    """The outputs of the float network, node by node, some values of which are replaced."""
    replaced = dict(zip(names, values, strict=True))

    class Replacing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found = super().run_node(n)
            return replaced.get(n.name, found)

    with model.quantization(weights=False, activations=False):
        return list(flatten_outputs(Replacing(model.image_graph.compiled).run(images)).values())


def distance_in_numpy(found: list[Tensor], targets: list[Tensor]) -> float:
    a, b = ([x.detach().double().numpy() for x in xs] for xs in (found, targets))
    if len(a) == 1:
        q, p = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a[0], b[0]))
        return float((np.exp(p) * (p - q)).sum(1).mean())
    return sum(float(((x - y) ** 2).sum() / (y**2).sum()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('make', [None, pyramid], ids=['scores', 'maps'])
@pytest.mark.parametrize('granularity', ['layer', 'block', 'net'])
def test_it_is_the_network_with_the_units_output_replaced(
    prepared: Prepare, host: ActivationCache, images: Tensor, make: Any, granularity: str
) -> None:
    model = prepared(model=None if make is None else make(), granularity=granularity)
    graph = model.image_graph
    streams = Streams(graph, graph.units, host.hold(images), host, 7)
    supervision = Supervision(streams, 0, 1.0, 1.0)
    targets = with_replaced(model, images, (), [])
    for index, unit in enumerate(graph.units):
        outputs = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
        rest = supervision.rest(unit)
        noisy = [x[:] + 0.3 * torch.randn(x[:].shape, generator=torch.Generator().manual_seed(1)) for x in outputs]
        for x in noisy:
            x.requires_grad_(True)
        beside = [streams.float_values[name][:] for name in rest.beside]
        # as in an iteration of the unit, quantization is on
        with torch.enable_grad(), graph.quantization(weights=True, activations=True):
            found = rest.distance(noisy, beside, [supervision._outputs[name][:] for name in rest.outputs])
            assert all(quantizer.enabled for quantizer in graph.quantizers.values())
        replaced = with_replaced(model, images, unit.outputs, noisy)
        assert float(found.detach()) == pytest.approx(distance_in_numpy(replaced, targets), rel=1e-4)
        expected = torch.autograd.grad(sum((r - t).sum() for r, t in zip(replaced, targets, strict=True)), noisy)
        seen = torch.autograd.grad(sum(o.sum() for o in rest(noisy, beside)), noisy)
        for one, other in zip(seen, expected, strict=True):
            torch.testing.assert_close(one, other)
        streams.advance(index, outputs, outputs)


def test_only_what_leads_to_an_output_is_computed(prepared: Prepare, host: ActivationCache, images: Tensor) -> None:
    model = prepared(model=pyramid(), granularity='layer')
    units = {unit.name: unit for unit in model.image_graph.units}
    streams = Streams(model.image_graph, model.image_graph.units, host.hold(images), host, 8)
    supervision = Supervision(streams, 0, 1.0, 1.0)
    assert {unit.name for unit in supervision.rest(units['last']).units} == {'scores', 'deltas'}
    assert len(supervision.rest(units['last']).outputs) == 2
    assert len(supervision.rest(units['stem']).outputs) == 3
    assert not supervision.rest(units['early']).units


def run(reconstructor: BaseReconstructor, task: Task, callback: Callback | None = None) -> list[UnitResult]:
    return reconstructor.run(task, reconstructor.plan(task), callback or Callback())


def state_of(task: Task) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


BEHIND: list[Any] = [
    pytest.param({'global_weight': 1.0}, id='global'),
    pytest.param({'global_weight': 0.5, 'global_share': 0.4, 'loss': {'type': 'FisherLoss'}}, id='share'),
    pytest.param({'loss': {'type': 'FisherLowRankLoss'}}, id='low-rank'),
    pytest.param({'loss': {'type': 'FisherLowRankLoss', 'rank': 1}, 'global_weight': 1.0}, id='both'),
]


@pytest.mark.parametrize('options', BEHIND)
def test_units_get_better_and_every_place_learns_the_same(
    options: dict[str, Any], prepared: Prepare, task: MakeTask
) -> None:
    found = []
    for place in ('host', 'disk'):
        work = task(prepared(activation_bits=4))
        results = run(QDropReconstructor(JOINT, cache=place, network={'iterations': 5}, **options), work)
        assert all(r.loss_after <= r.loss_before for r in results)
        assert sum(r.loss_after for r in results) < 0.9 * sum(r.loss_before for r in results)
        found.append(state_of(work))
    assert same(*found)
    plain = task(prepared(activation_bits=4))
    run(QDropReconstructor(JOINT, network={'iterations': 5}), plain)
    assert not same(found[0], state_of(plain))


@pytest.mark.parametrize('options', BEHIND)
def test_several_outputs(options: dict[str, Any], prepared: Prepare, task: MakeTask) -> None:
    work = task(prepared(model=pyramid(), granularity='layer'))
    work.task_loss = None
    results = run(QDropReconstructor(JOINT, mirror='loss' not in options, **options), work)
    assert sum(r.loss_after for r in results) < 0.98 * sum(r.loss_before for r in results)


@pytest.mark.parametrize('options', BEHIND)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    options: dict[str, Any], prepared: Prepare, task: MakeTask
) -> None:
    whole, finished = task(prepared()), {}

    class Keep(Callback):
        def after_unit(self, stage: Any, unit: Any, result: UnitResult, progress: Any) -> None:
            finished[stage.name, unit.name] = FinishedUnit(result, unit_state(whole.model.model, unit))

    run(QDropReconstructor(JOINT, **options), whole, Keep())
    resumed = task(prepared())
    resumed.resumed = dict(list(finished.items())[:2])
    run(QDropReconstructor(JOINT, **options), resumed)
    assert same(state_of(whole), state_of(resumed))


def test_at_a_weight_of_one_both_parts_count_alike(
    prepared: Prepare, task: MakeTask, host: ActivationCache, images: Tensor
) -> None:
    losses = [
        [r.loss_before for r in run(BRECQReconstructor(JOINT, JOINT, global_weight=weight), task(prepared()))]
        for weight in (0.0, 1.0, 3.0)
    ]
    # the units before the second one have learned the same
    assert losses[1][0] == pytest.approx(2 * losses[0][0], rel=1e-5)
    assert losses[2][0] == pytest.approx(4 * losses[0][0], rel=1e-5)


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'global_weight': -1}, r'expected reconstructor.global_weight to be a number in \[0, inf\), but got -1'),
        ({'global_share': 0}, r'expected reconstructor.global_share to be a number in \(0, 1\], but got 0'),
        ({'loss': {'type': 'FisherLowRankLoss', 'rank': 4}}, r'expected rank of FisherLowRankLoss in 1..3, but got 4'),
        (
            {'loss': {'type': 'FisherLowRankLoss', 'diagonal': 2}},
            r'expected diagonal of FisherLowRankLoss to be a number in \[0, 1\], but got 2',
        ),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        QDropReconstructor(**options)


def test_the_plan_knows_of_the_outputs(prepared: Prepare, task: MakeTask, tmp_path: Path) -> None:
    work = task(prepared())
    plans = [QDropReconstructor(JOINT, **options).plan(work) for options in ({}, {'global_weight': 1.0})]
    # 24 images, 5 classes
    assert plans[1].peak_bytes - plans[0].peak_bytes == 4 * 24 * 5
    assert plans[1].working_bytes > plans[0].working_bytes
