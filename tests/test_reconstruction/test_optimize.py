from __future__ import annotations

import doctest
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.errors import NonFiniteError
from mmbrecq.fake_quants import LSQ, AdaRound, NearestRounding
from mmbrecq.fake_quants.weight import WeightFakeQuantize
from mmbrecq.functional import affine_from_range
from mmbrecq.qtype import QType
from mmbrecq.reconstruction import MSELoss, Stage, StageOptions
from mmbrecq.reconstruction.batches import UnitData
from mmbrecq.reconstruction.optimize import CHECK_INTERVAL, linear_beta, optimize_unit
from mmbrecq.reconstruction.variables import Variables

COUNT = 40
OPTIONS: dict[str, Any] = {
    'iterations': 150, 'batch_size': 8, 'lr': 3e-2, 'bias_lr': 0.0, 'weight_scale_lr': 0.0, 'activation_lr': 1e-2,
    'round_weight': 5.0,
}  # fmt: skip


class Unit(nn.Module):
    """An activation quantizer before a linear layer with quantized weights; notes the inputs that it gets."""

    def __init__(self, rounding: type[WeightFakeQuantize] = AdaRound) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fc = nn.Linear(16, 6)
        for parameter in self.fc.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.quantizer = LSQ(QType(4))
        self.quantizer.set_grid(torch.tensor(0.2), torch.tensor(0))
        weight = self.fc.weight.detach().clone()
        self.rounding = rounding(QType(2, symmetric=False, signed=False, ch_axis=0), weight.shape)
        self.rounding.calibrate(weight, *affine_from_range(weight.amin(1), weight.amax(1), self.rounding.qtype))
        self.fc.requires_grad_(False)
        parametrize.register_parametrization(self.fc, 'weight', self.rounding, unsafe=True)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.seen.append(x.detach().clone())
        return (self.fc(self.quantizer(x)),)

    def switch(self, on: bool) -> None:
        self.rounding.enabled = self.quantizer.enabled = on


def data_of(unit: Unit, noise: float = 0.1) -> UnitData:
    """Inputs with correlated features, so that rounding to nearest is not the best."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    with torch.no_grad():
        (target,) = unit(x)
    unit.seen.clear()
    return UnitData([x + noise * torch.randn(x.shape, generator=generator)], [x], [target])


def learn(
    unit: Unit,
    data: UnitData,
    rounding: bool = True,
    scale: bool = False,
    seed: int = 0,
    loss: Any = None,
    **options: Any,
) -> tuple[int, list[tuple[int, float]]]:
    """Optimises the unit; returns the number of steps, and what was told on the way."""
    told: list[tuple[int, float]] = []
    stage = Stage('joint', StageOptions(**{**OPTIONS, **options}), rounding, scale)
    unit.rounding.enabled, unit.quantizer.enabled = True, scale
    steps = optimize_unit(
        'backbone.stem', unit, [(unit.fc, unit.rounding)], [unit.quantizer], data, loss or MSELoss(), stage,
        torch.Generator().manual_seed(seed), torch.device('cpu'), lambda *args: told.append(args),
    )  # fmt: skip
    return steps, told


def mean_loss(unit: Unit, data: UnitData) -> float:
    with torch.no_grad():
        (output,) = unit(data.quantized_inputs[0])
    return float(((output - data.targets[0]) ** 2).sum(1).mean())


def first_draws(count: int, batch_size: int, seed: int = 0) -> list[Tensor]:
    """The images of every step, where nothing else is drawn."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(COUNT, generator=generator)[:batch_size] for _ in range(count)]


@pytest.mark.parametrize(
    'options',
    [
        {'rounding': True},
        {'rounding': True, 'weight_scale_lr': 3e-3},
        {'rounding': False, 'weight_scale_lr': 3e-3},
        {'rounding': False, 'scale': True},
        {'rounding': True, 'scale': True, 'drop_prob': 0.5},
    ],
    ids=['rounding', 'rounding-and-gain', 'gain', 'step-size', 'joint-with-dropping'],
)
def test_the_loss_falls(options: Any) -> None:
    unit = Unit()
    data = data_of(unit)
    unit.rounding.enabled, unit.quantizer.enabled = True, options.get('scale', False)
    before = mean_loss(unit, data)
    steps, _ = learn(unit, data, **options)
    assert steps == OPTIONS['iterations']
    assert mean_loss(unit, data) < 0.9 * before


def test_learned_rounding_is_nearly_the_best() -> None:
    """Held against all 2**8 ways to round one row of 8 weights."""
    unit = Unit()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1, 8, generator=generator)
    unit.fc = nn.Linear(8, 1, bias=False)
    unit.fc.weight.data.copy_(weight)
    unit.fc.requires_grad_(False)
    unit.rounding = AdaRound(QType(8), weight.shape)
    scale = torch.tensor(0.5)
    unit.rounding.calibrate(weight, scale, torch.tensor(0))
    parametrize.register_parametrization(unit.fc, 'weight', unit.rounding, unsafe=True)
    x = torch.randn(COUNT, 8, generator=generator) + 2
    data = UnitData([x], [x], [x @ weight.T])
    learn(unit, data, iterations=600, round_weight=1.0, lr=1e-2)
    choices = np.array(np.meshgrid(*[[0, 1]] * 8)).reshape(8, -1).T
    weights = (np.floor(weight.numpy() / 0.5) + choices) * 0.5
    losses = ((x.numpy() @ (weights - weight.numpy()).T) ** 2).mean(0)
    assert mean_loss(unit, data) <= np.sort(losses)[5]
    nearest = np.rint(weight.numpy() / 0.5) * 0.5
    assert mean_loss(unit, data) < ((x.numpy() @ (nearest - weight.numpy()).T) ** 2).mean()


def test_codes_move_by_one_at_most() -> None:
    unit = Unit()
    weight = unit.fc.weight.detach().clone()
    learn(unit, data_of(unit))
    scale, zero = unit.rounding.scale.reshape(-1, 1), unit.rounding.zero_point.reshape(-1, 1)
    low = torch.floor(weight / scale) + zero
    codes = unit.rounding.codes
    assert ((codes == low.clamp(0, 3)) | (codes == (low + 1).clamp(0, 3))).all()


def test_nothing_to_learn_takes_no_step() -> None:
    unit = Unit(NearestRounding)
    state = {k: v.clone() for k, v in unit.state_dict().items()}
    steps, told = learn(unit, data_of(unit))
    assert (steps, told, unit.seen) == (0, [], [])
    assert all(torch.equal(v, state[k]) for k, v in unit.state_dict().items())


@pytest.mark.parametrize('options', [{}, {'scale': True, 'drop_prob': 0.5}], ids=['weights', 'joint'])
def test_the_generator_alone_decides(options: Any) -> None:
    states = []
    for seed, global_seed in ((0, 1), (0, 2), (3, 1)):
        unit = Unit()
        data = data_of(unit)
        torch.manual_seed(global_seed)
        learn(unit, data, seed=seed, round_weight=0.1, weight_scale_lr=1e-3, **options)
        states.append(unit.state_dict())
    same = [all(torch.equal(states[0][k], other[k]) for k in other) for other in states[1:]]
    assert same == [True, False]


def test_batches_are_drawn_without_repetition() -> None:
    unit = Unit()
    data = data_of(unit)
    learn(unit, data, iterations=20)
    assert [len(x) for x in unit.seen] == [8] * 20
    for x, index in zip(unit.seen, first_draws(20, 8), strict=True):
        assert torch.equal(x, data.quantized_inputs[0][index])
        assert len(set(index.tolist())) == 8


def test_a_batch_larger_than_the_set_takes_all() -> None:
    unit = Unit()
    learn(unit, data_of(unit), iterations=3, batch_size=1000)
    assert [len(x) for x in unit.seen] == [COUNT] * 3


def test_dropping_mixes_the_two_streams() -> None:
    unit = Unit()
    data = data_of(unit, noise=1.0)
    learn(unit, data, scale=True, drop_prob=0.3, iterations=30)
    shares = []
    for x in unit.seen:
        # the image of every row: no other has a value of it
        rows = [int(((data.float_inputs[0] == r) | (data.quantized_inputs[0] == r)).all(1).nonzero()[0]) for r in x]
        shares.append((x == data.float_inputs[0][rows]).double().mean())
    sigma = (0.3 * 0.7 / (30 * 8 * 16)) ** 0.5
    assert abs(float(torch.stack(shares).mean()) - 0.3) < 5 * sigma


def test_dropping_is_off_afterwards() -> None:
    unit = Unit()
    data = data_of(unit)
    learn(unit, data, scale=True, drop_prob=0.5, iterations=3)
    assert unit.quantizer.masks is None
    data.targets[0].fill_(float('nan'))
    with pytest.raises(NonFiniteError):
        learn(unit, data, scale=True, drop_prob=0.5, iterations=3)
    assert unit.quantizer.masks is None


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_names_unit_and_step(bad: float) -> None:
    unit = Unit()
    data = data_of(unit)
    # the image that is drawn last of all
    steps = [next(s for s, d in enumerate(first_draws(150, 8)) if image in d) for image in range(COUNT)]
    step, image = max((s, i) for i, s in enumerate(steps))
    assert step > 0
    data.targets[0][image] = bad
    with pytest.raises(NonFiniteError, match=rf"^the loss of unit 'backbone\.stem' is {bad} at iteration {step}$"):
        learn(unit, data)


def test_progress_is_told_now_and_then() -> None:
    """The mean of the reconstruction losses since the last word."""
    unit = Unit()
    losses = []

    def loss(output: Tensor, target: Tensor, fisher: Tensor | None) -> Tensor:
        value = MSELoss()(output, target)
        losses.append(float(value.detach()))
        return value

    _, told = learn(unit, data_of(unit), iterations=CHECK_INTERVAL + 30, loss=loss)
    assert [step for step, _ in told] == [CHECK_INTERVAL, CHECK_INTERVAL + 30]
    assert told[0][1] == pytest.approx(np.mean(losses[:CHECK_INTERVAL]), rel=1e-5)
    assert told[1][1] == pytest.approx(np.mean(losses[CHECK_INTERVAL:]), rel=1e-5)


@pytest.fixture
def betas(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Exponents of the regulariser, step by step; None in the warm-up."""
    noted: list[float | None] = []
    collect = Variables.collect_gradients

    def note(variables: Variables, beta: float | None, *args: Any) -> None:
        noted.append(beta)
        collect(variables, beta, *args)

    monkeypatch.setattr(Variables, 'collect_gradients', note)
    return noted


def test_a_plateau_ends_the_training_of_step_sizes() -> None:
    unit = Unit()
    steps, told = learn(unit, data_of(unit), rounding=False, scale=True, iterations=5000, plateau=0.2)
    assert steps < 5000
    assert steps % CHECK_INTERVAL == 0
    assert told[-1][0] == steps
    losses = [loss for _, loss in told]
    falls = [loss <= 0.8 * min(losses[:i]) for i, loss in enumerate(losses) if i]
    assert falls == [True] * (len(falls) - 1) + [False]
    assert not unit.quantizer.scale.requires_grad


def test_a_plateau_ends_the_warmup_where_rounding_is_learned(betas: list[float | None]) -> None:
    unit = Unit()
    steps, told = learn(unit, data_of(unit), iterations=1000, plateau=0.5, warmup=0.8, beta=(12.0, 2.0))
    # the second hundred steps gain less than half; all that follows the warm-up is there
    assert betas[:200] == [None] * 200
    assert betas[200:] == pytest.approx([12 - 10 * t / 200 for t in range(200)])
    assert (steps, told[-1][0]) == (400, 400)


def test_beta_follows_its_schedule(betas: list[float | None]) -> None:
    unit = Unit()
    learn(unit, data_of(unit), iterations=10, beta=(12.0, 4.0), warmup=0.2)
    assert betas[:2] == [None, None]
    assert betas[2:] == pytest.approx([12 - 8 * (t - 2) / 8 for t in range(2, 10)])


def test_the_regulariser_alone_settles_every_variable_on_its_nearer_side() -> None:
    unit = Unit()
    nearest = unit.rounding.codes.clone()
    data = data_of(unit)
    lower, scale = unit.fc.parametrizations['weight'].original, unit.rounding.scale[:, None]  # type: ignore[union-attr]
    hs = []

    def no_loss(output: Tensor, target: Tensor, fisher: Tensor | None) -> Tensor:
        ratio = unit.fc.weight.detach() / scale
        hs.append(ratio - torch.floor(lower / scale))
        return 0 * MSELoss()(output, target)

    learn(unit, data, loss=no_loss, warmup=0, round_weight=1.0, iterations=400, lr=3e-2)
    assert torch.equal(unit.rounding.codes, nearest)
    undecided = [float(((h > 0.01) & (h < 0.99)).double().mean()) for h in (hs[0], hs[-1])]
    assert undecided[0] > 0.5
    assert undecided[1] < 0.05


@pytest.mark.parametrize('importance', [None, [0.25, 1.75]])
@pytest.mark.parametrize('index', [slice(3, 9), torch.tensor([5, 0, 7])], ids=['slice', 'indices'])
def test_losses_of_several_outputs_add_up(index: Any, importance: list[float] | None) -> None:
    rng = np.random.default_rng(0)
    shapes = [(10, 3, 4), (10, 5)]
    targets, fisher = ([rng.normal(size=s) for s in shapes] for _ in range(2))
    selection = np.arange(10)[index.numpy() if isinstance(index, Tensor) else index]
    outputs = [rng.normal(size=(len(selection), *s[1:])) for s in shapes]

    def weighted(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return (weight * (output - target)).sum()

    as_tensors: Callable[[Any], list[Tensor]] = lambda arrays: [torch.from_numpy(a) for a in arrays]  # noqa: E731
    data = UnitData([], [], as_tensors(targets), as_tensors(fisher), importance)
    values = zip(outputs, targets, fisher, importance or [1, 1], strict=True)
    expected = sum(i * (f[selection] * (o - t[selection])).sum() for o, t, f, i in values)
    assert float(data.read(index).loss(as_tensors(outputs), weighted)) == pytest.approx(expected)
    if isinstance(index, Tensor):
        batch = data.read(index, floats=False)
        parts = list(batch.laid_out(torch.contiguous_format).parts(2))
        assert [len(part) for part in parts] == [2, 1] and all(part.importance == importance for part in parts)


@pytest.mark.parametrize('t', [0.0, 0.1, 0.1999])
def test_no_regulariser_during_the_warm_up(t: float) -> None:
    assert linear_beta(t, 20, 2, 0.2) is None


@pytest.mark.parametrize(
    ('t', 'beta'), [(0.2, 20.0), (0.4, 15.5), (0.6, 11.0), (0.8, 6.5), (0.99, 2.225), (1.0, 2.0), (1.5, 2.0)]
)
def test_linear_from_start_to_end(t: float, beta: float) -> None:
    """20 -> 2 after a warm-up of 20 %: 20 - 18 (t - 0.2) / 0.8."""
    assert linear_beta(t, 20, 2, 0.2) == pytest.approx(beta)


def test_without_warm_up() -> None:
    assert [linear_beta(t / 4, start=10, end=4, warmup=0) for t in range(5)] == pytest.approx([10, 8.5, 7, 5.5, 4])


def test_falls_at_every_step() -> None:
    values = [linear_beta(0.25 + t / 200, 20, 2, 0.2) for t in range(150)]
    assert all(a is not None and b is not None and a > b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    'name',
    ['fake_quants.masks', 'fake_quants.ops', *(f'reconstruction.{m}' for m in ('callbacks', 'methods', 'optimize'))],
)
def test_examples_of_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f'mmbrecq.{name}'))
    assert result.attempted > 0 and result.failed == 0
