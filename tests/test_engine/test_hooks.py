"""The hooks that every run has."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.hooks.hook import Hook
from mmengine.registry import HOOKS as ROOT_HOOKS
from rich.console import Console

from mmbrecq import progress
from mmbrecq.engine.hooks import (
    HookCaller,
    ReconstructionLoggerHook,
    ReconstructionProgressHook,
    ReconstructionScalarsHook,
)
from mmbrecq.reconstruction.callbacks import Progress
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, StageOptions

STAGE: Any = Stage('weights', StageOptions(iterations=50, batch_size=4), True, False)


def unit(name: str) -> Any:
    return SimpleNamespace(name=name, is_quantized=True)


def result(name: str, kept: bool = False) -> UnitResult:
    return UnitResult(name, 'weights', ('a',), 2.0, 2.0 if kept else 1.0, 50, 0.25, kept, 8.0)


def test_hooks_are_mmengines_own_kind() -> None:
    for name in ('ReconstructionLoggerHook', 'ReconstructionScalarsHook', 'ReconstructionProgressHook'):
        assert issubclass(ROOT_HOOKS.get(f'mmbrecq.{name}'), Hook)


def test_what_a_reconstruction_tells_reaches_every_hook() -> None:
    calls: list[Any] = []
    caller = HookCaller(SimpleNamespace(call_hook=lambda name, **values: calls.append((name, values))))  # type: ignore[arg-type]
    one, outcome = unit('a'), result('a')
    caller.before_stage(STAGE, [one], Progress(0, 1))
    caller.before_unit(STAGE, one)
    caller.after_step(STAGE, one, 7, 0.5)
    caller.after_unit(STAGE, one, outcome, Progress(1, 1, 0.0))
    caller.after_stage(STAGE)
    assert calls == [
        ('before_reconstruct_stage', {'stage': STAGE, 'units': [one], 'progress': Progress(0, 1)}),
        ('before_reconstruct_unit', {'stage': STAGE, 'unit': one}),
        ('after_reconstruct_step', {'stage': STAGE, 'unit': one, 'step': 7, 'loss': 0.5}),
        ('after_reconstruct_unit', {'stage': STAGE, 'unit': one, 'result': outcome, 'progress': Progress(1, 1, 0.0)}),
        ('after_reconstruct_stage', {'stage': STAGE}),
    ]


@pytest.mark.parametrize('done', [0, 1])
def test_the_log_has_a_line_for_every_unit(done: int) -> None:
    lines: list[str] = []
    runner: Any = SimpleNamespace(logger=SimpleNamespace(info=lines.append))
    hook = ReconstructionLoggerHook()
    count = done + 2
    hook.before_reconstruct_stage(runner, stage=STAGE, units=[], progress=Progress(done, count))
    hook.after_reconstruct_unit(
        runner, stage=STAGE, unit=unit('a'), result=result('a'), progress=Progress(done + 1, count, 100.0)
    )
    hook.after_reconstruct_unit(
        runner, stage=STAGE, unit=unit('b'), result=result('b', kept=True), progress=Progress(count, count, 0.0)
    )
    assert lines == [
        f'reconstruction of weights: {done + 2} units, 50 iterations of 4 images each'
        + ('; 1 units are done' if done else ''),
        f'weights {done + 1}/{done + 2} a: loss 2 -> 1, 25 -> 12 % of its output, 50 iterations, 0.2 s, '
        'about 1 min 40 s left',
        f'weights {done + 2}/{done + 2} b: loss 2 -> 2, 25 -> 25 % of its output, 50 iterations, 0.2 s, '
        'worse than before: kept as it was',
    ]


@pytest.mark.parametrize('done', [0, 2])
def test_losses_reach_the_backends_of_the_visualizer(done: int) -> None:
    scalars: list[Any] = []
    runner: Any = SimpleNamespace(visualizer=SimpleNamespace(add_scalar=lambda *values: scalars.append(values)))
    hook = ReconstructionScalarsHook()
    hook.after_reconstruct_step(runner, stage=STAGE, unit=unit('a'), step=50, loss=0.5)
    hook.after_reconstruct_unit(runner, result=result('a'), progress=Progress(done + 1, 3))
    assert scalars == [
        ('weights/a', 0.5, 50), ('weights/before', 0.25, done + 1), ('weights/after', 0.125, done + 1)
    ]  # fmt: skip


def test_an_output_without_power_has_no_relative_loss() -> None:
    assert all(math.isnan(loss) for loss in replace(result('a'), power=0.0).relative_losses)


@pytest.mark.parametrize('breaks_off', [False, True])
def test_the_bar_goes_with_its_unit_or_with_the_reconstruction(
    monkeypatch: pytest.MonkeyPatch, breaks_off: bool
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(
        progress, 'Console', lambda **_: Console(file=written, force_terminal=True, width=120, color_system=None)
    )
    runner: Any = object()
    hook = ReconstructionProgressHook()
    hook.before_reconstruct_unit(runner, STAGE, unit('layer1'))
    hook.after_reconstruct_step(runner, stage=STAGE, unit=unit('layer1'), step=25, loss=0.125)
    if not breaks_off:
        hook.after_reconstruct_unit(
            runner, stage=STAGE, unit=unit('layer1'), result=result('layer1'), progress=Progress(1, 1)
        )
    hook.after_reconstruct(runner)
    drawn = written.getvalue()
    assert drawn.rindex('\x1b[?25h') > drawn.rindex('\x1b[?25l')
    for part in ('weights layer1', '25/50', 'loss 0.125'):
        assert part in drawn


def test_the_bar_goes_before_the_log_line_comes() -> None:
    order = ('ABOVE_NORMAL', 'NORMAL', 'LOW')
    hooks: Any = (ReconstructionProgressHook, ReconstructionLoggerHook, ReconstructionScalarsHook)
    assert tuple(hook.priority for hook in hooks) == order
